"""What is compiled ahead of a search covers what the search's choices ask the planner for."""

from itertools import chain

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numba.cuda")

from moe.cli.layer import FORMATS, layer_of_shape
from moe.gemm import kernels
from moe.gemm.swapped import gemm1 as swapped_gemm1
from moe.gemm.swapped import gemm2 as swapped_gemm2
from moe.gemm.wide import gemm1 as wide_gemm1
from moe.gemm.wide import gemm2 as wide_gemm2
from moe.shapes import NAMED_SHAPES
from moe.tuning.ahead import planning_jobs
from moe.tuning.buckets import buckets_up_to
from moe.tuning.candidates import Candidates, kernels_on

CUDA = torch.device("cuda", 0)


def clear_caches() -> None:
    for cached in (kernels.kernels_for, kernels.kernel_for, kernels.unit_size):
        cached.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    for module in (wide_gemm1, wide_gemm2, swapped_gemm1, swapped_gemm2):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    clear_caches()
    yield CUDA
    clear_caches()


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "mixtral-8x7b", "nemotron-3-nano-30b-a3b"])
def test_units_of_every_choice_are_among_the_jobs(model: str, hopper: torch.device):
    config = layer_of_shape(NAMED_SHAPES[model], FORMATS["hf"]).config
    for num_tokens in buckets_up_to(2048)[4:]:
        candidates = Candidates(config, num_tokens, kernels_on(hopper))
        sizes = {job.unit_size for job in planning_jobs(config, [candidates], hopper)}
        compositions = candidates.compositions()
        variants = (axis(best) for best in compositions for axis in candidates.variants(best))
        for choice in {*compositions, *chain.from_iterable(variants)}:
            applied = choice.apply(config)
            loads = applied.permute.rows_per_tile(num_tokens), applied.permute.mean_rows(num_tokens)
            size = kernels.unit_size(hopper, *loads, gemm1=applied.gemm1, gemm2=applied.gemm2)
            assert (size and (size.max_rows, size.multiple, size.max_group)) in sizes


def test_buckets_of_few_tokens_plan_nothing(hopper: torch.device):
    config = layer_of_shape(NAMED_SHAPES["qwen3-30b-a3b"], FORMATS["hf"]).config
    candidates = Candidates(config, 1, kernels_on(hopper))
    assert not candidates.runs_grouped
    assert planning_jobs(config, [candidates], hopper) == []
