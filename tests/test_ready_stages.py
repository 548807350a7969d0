"""Pipelines of our stages with others among them: which checks stay, and whose scratch lies where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_layer import REFERENCE_OF_STAGE, SMALL
from torch import Tensor

from moe import MoEConfig, MoEPipeline, TopK, reference_pipeline
from moe.fused.few_tokens.config import FewTokenConfig
from moe.permute.reference import finalize_tokens_reference
from moe.runtime.scratch import new_scratch
from moe.stages import CheckedStage, FusedExperts
from moe.testing.problems import make_problem

CONFIG = MoEConfig.create(**SMALL)
PROBLEM = make_problem(CONFIG, 16)
TENSORS = (PROBLEM.logits, PROBLEM.hidden_states, PROBLEM.w1, PROBLEM.w2)


def from_scratch(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stage whose result lies where our kernels' does."""

    def run(*args: Any, **more: Any) -> Tensor:
        result = stage(*args, **more)
        return new_scratch(result, result.shape).copy_(result)

    return run


def unchecked_finalize(*args: Any, output: Tensor | None = None, **more: Any) -> Tensor:
    result = finalize_tokens_reference(*args, config=CONFIG.finalize, **more)
    return result if output is None else output.copy_(result)


def our_pipeline() -> MoEPipeline:
    """References in the two forms of our stages, with scratch as our kernels take it."""
    plain = reference_pipeline(CONFIG)
    gemm1, gemm2 = from_scratch(plain.gemm1), from_scratch(plain.gemm2)
    return replace(
        plain,
        route=CheckedStage(plain.route, plain.route, CONFIG.routing),
        permute=CheckedStage(plain.permute, plain.permute, CONFIG.permute),
        gemm1=CheckedStage(gemm1, gemm1, CONFIG.gemm1),
        gemm2=CheckedStage(gemm2, gemm2, CONFIG.gemm2),
        finalize=CheckedStage(plain.finalize, unchecked_finalize, CONFIG.finalize),
    )


def test_a_result_of_a_swapped_stage_that_lies_in_the_output_is_refused() -> None:
    ours, arena = our_pipeline(), torch.zeros(CONFIG.permute.max_rows(16), 128, dtype=torch.bfloat16)

    def my_gemm2(*args: Any) -> Tensor:
        return arena.copy_(ours.gemm2(*args))

    def my_route(*args: Any, **more: Any) -> TopK:
        topk = ours.route(*args, **more)
        return TopK(topk.expert_ids, arena.view(-1)[:32].view(16, 2).copy_(topk.weights))

    with pytest.raises(ValueError, match=r"output: expected memory of its own, .* shares memory with rows"):
        replace(ours, gemm2=my_gemm2)(*TENSORS, output=arena[:16])
    with pytest.raises(ValueError, match=r"output: expected memory of its own, .* shares memory with expert_weights"):
        replace(ours, route=my_route)(*TENSORS, output=arena[:16])


@pytest.mark.parametrize("num_experts", [8, 16])
def test_fused_experts_of_another_layer_check_their_tensors(num_experts: int) -> None:
    ours, calls = our_pipeline(), []
    other = MoEConfig.create(**SMALL | {"num_experts": num_experts})
    few = FewTokenConfig.of_stages(other.permute, other.gemm1, other.gemm2)

    def form(name: str) -> Callable[..., Tensor]:
        return lambda topk, hidden_states, *args, **more: calls.append(name) or hidden_states

    chain = (ours.permute, ours.gemm1, ours.gemm2, ours.finalize)
    replace(ours, fused=FusedExperts(CheckedStage(form("run"), form("launch"), few), 16, chain))(*TENSORS)
    assert calls == ["launch" if num_experts == CONFIG.num_experts else "run"]


@pytest.mark.parametrize("checks_inputs", [True, False])
def test_a_swapped_stage_may_run_our_kernels_as_often_as_it_likes_beside_a_buffer(checks_inputs: bool) -> None:
    ours, kept = our_pipeline(), []

    def my_gemm1(*args: Any, **more: Any) -> Tensor:
        kept.append(ours.expert_outputs(*TENSORS).rows)  # a layer within the layer, kept
        return ours.gemm1(*args, **more) + ours.gemm1(*args, **more)

    mine = replace(ours, gemm1=my_gemm1, checks_inputs=checks_inputs)
    buffer = torch.empty(ours.workspace(16).asked_bytes, dtype=torch.uint8)
    first = buffer.data_ptr()
    assert torch.equal(mine(*TENSORS, workspace=buffer), mine(*TENSORS))
    assert not any(first <= rows.data_ptr() < first + buffer.nbytes for rows in kept)


@pytest.mark.parametrize("stage", REFERENCE_OF_STAGE)
def test_our_stages_launch_as_long_as_only_ours_ran_before(stage: str) -> None:
    names = ("route", "permute", "gemm1", "gemm2", "finalize")
    plain, checked, launched = reference_pipeline(CONFIG), [], []

    def noted(name: str, notes: list[str]) -> Callable[..., Any]:
        return lambda *args, **more: notes.append(name) or getattr(plain, name)(*args, **more)

    configs = dict(zip(names, (CONFIG.routing, CONFIG.permute, CONFIG.gemm1, CONFIG.gemm2, CONFIG.finalize)))
    ours = {name: CheckedStage(noted(name, checked), noted(name, launched), part) for name, part in configs.items()}
    replace(plain, **ours | {stage: getattr(plain, stage)})(*TENSORS)
    index = names.index(stage)
    assert (tuple(launched), tuple(checked)) == (names[:index], names[index + 1 :])
