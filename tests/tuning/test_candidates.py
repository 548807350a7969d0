"""What the search times: few choices, all valid, of kernels that have a chance."""

from itertools import chain

import pytest

from moe.config import MoEConfig
from moe.gemm.config import FLASHINFER, GemmConfig, GemmTile, WeightFormat, WeightLayout
from moe.tuning.buckets import buckets_up_to
from moe.tuning.candidates import Candidates, left_to_the_model
from moe.tuning.choice import TuningChoice

REAL = {"hidden_size": 2048, "intermediate_size": 768, "num_experts": 128, "top_k": 8}
MOST_KERNELS = 40  # compiled for a layer and all its buckets; a second of one core each, eight at a time


def hopper_kernels(gemm: GemmConfig, tile_rows: int) -> tuple[str, ...]:
    return ("portable", "swapped", "wide") if tile_rows >= 64 else ("portable", "swapped")


def portable_only(gemm: GemmConfig, tile_rows: int) -> tuple[str, ...]:
    return ("portable",)


def all_choices(candidates: Candidates) -> list[TuningChoice]:
    """Every choice that a search might time, were each composition the best one in turn."""
    compositions = candidates.compositions()
    axes = ((axis, best) for best in compositions for axis in candidates.variants(best))
    return [*compositions, *chain.from_iterable(axis(best) for axis, best in axes)]


@pytest.mark.parametrize("kernels_of", [hopper_kernels, portable_only])
@pytest.mark.parametrize("num_tokens", [1, 8, 24, 192, 1024, 8192])
@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=["hf", "flashinfer"])
def test_every_choice_makes_a_valid_config_that_differs_from_the_models(weight_format, num_tokens, kernels_of):
    config = MoEConfig.create(**REAL, weight_format=weight_format)
    choices = all_choices(Candidates(config, num_tokens, kernels_of))
    assert choices[0] == TuningChoice()
    assert all(choice.apply(config) != config for choice in choices[1:])


@pytest.mark.parametrize("num_tokens", [1, 8, 24, 192, 1024, 8192])
def test_one_bucket_times_a_dozen_choices_or_two(num_tokens: int):
    candidates = Candidates(MoEConfig.create(**REAL), num_tokens, hopper_kernels)
    compositions = candidates.compositions()
    timed = max(len(compositions) + sum(len(axis(best)) for axis in candidates.variants(best)) for best in compositions)
    assert 4 <= timed <= 24


def test_all_buckets_of_a_layer_compile_few_kernels():
    config = MoEConfig.create(**REAL)
    kernels = set()
    for num_tokens in buckets_up_to(8192):
        candidates = Candidates(config, num_tokens, hopper_kernels)
        for choice in all_choices(candidates):
            tile_rows = choice.tile_rows or config.permute.rows_per_tile(num_tokens)
            for stage in ("gemm1", "gemm2"):
                kernel, tile = getattr(choice, f"{stage}_kernel"), getattr(choice, f"{stage}_tile")
                kernels.add((stage, kernel, tile, tile_rows) if kernel == "portable" else (stage, kernel))
            kernels |= {choice.slot_tile, choice.token_tile}
    assert len(kernels) <= MOST_KERNELS


def test_few_token_kernels_and_the_grouped_chain_meet_only_near_the_border():
    config = MoEConfig.create(**REAL)
    border = Candidates(config, 1, portable_only)._few_token_border()
    assert border > 4

    def compositions(num_tokens: int) -> set[bool | None]:
        found = Candidates(config, num_tokens, portable_only).compositions()
        return {choice.uses_few_tokens for choice in found}

    assert compositions(1) == {None}
    assert compositions(border) == {None, False}
    assert compositions(border + 1) == {None, True}
    assert compositions(4 * border) == {None, True}
    assert compositions(4 * border + 1) == {None}


def test_layer_that_the_few_token_kernels_do_not_take_has_grouped_chains_alone():
    config = MoEConfig.create(**REAL, weight_format=WeightFormat(layout=WeightLayout.MajorMn))
    candidates = Candidates(config, 1, portable_only)
    assert len(candidates.compositions()) > 1
    assert all(choice.uses_few_tokens is None for choice in candidates.compositions())
    assert all(choice.slot_tile is None for choice in all_choices(candidates))


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(64, {"portable"}), (512, {"portable", "swapped"}), (2048, {"portable", "swapped", "wide"}), (16384, {"wide"})],
)
def test_kernels_are_tried_by_the_mean_load(num_tokens: int, expected: set[str]):
    choices = all_choices(Candidates(MoEConfig.create(**REAL), num_tokens, hopper_kernels))
    named = {choice.gemm1_kernel for choice in choices} | {choice.gemm2_kernel for choice in choices}
    assert named - {None} == expected


def test_kernels_are_named_together_with_the_rows_that_they_take():
    for num_tokens in (64, 512, 2048, 16384):
        for choice in all_choices(Candidates(MoEConfig.create(**REAL), num_tokens, hopper_kernels)):
            assert choice.tile_rows is not None or (choice.gemm1_kernel is None and choice.gemm2_kernel is None)


def test_left_to_the_model_forgets_what_was_named_and_nothing_else():
    config = MoEConfig.create(**REAL, weight_format=FLASHINFER, local_expert_offset=32, num_local_experts=64)
    named = TuningChoice(
        uses_few_tokens=False,
        tile_rows=64,
        gemm1_kernel="portable",
        gemm1_tile=GemmTile(block_n=64, block_k=64, num_warps=4, num_stages=3),
        finalize_block_h=512,
    ).apply(config)
    assert named != config
    assert left_to_the_model(named) == config
