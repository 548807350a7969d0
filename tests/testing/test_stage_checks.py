"""The contract of a stage as one call: what is right passes, and each of the usual mistakes is found and named."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moe import FLASHINFER, MoEConfig, TopK, reference_pipeline
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference
from moe.routing.reference import select_experts_reference
from moe.testing import (
    check_finalize,
    check_gemm1,
    check_gemm2,
    check_permute,
    check_route,
    poisoned_memory,
)
from moe.testing.problems import activated_in_float64
from moe.testing.stages import AWKWARD

CONFIGS = {
    "awkward": None,
    "relu2": MoEConfig.create(hidden_size=64, intermediate_size=40, num_experts=5, top_k=3, activation="Relu2"),
    "flashinfer": MoEConfig.create(
        hidden_size=128, intermediate_size=128, num_experts=4, top_k=1, weight_format=FLASHINFER
    ),
    "biased-groups": MoEConfig.create(
        hidden_size=64, intermediate_size=64, num_experts=16, top_k=2, method="DeepSeekV3", n_group=4, topk_group=2
    ),
}


def my_gemm2(rows, weights, permutation):
    """One matmul a tile."""
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    for tile in range(int(permutation.num_tiles)):
        lines = slice(tile * permutation.tile_rows, (tile + 1) * permutation.tile_rows)
        out[lines] = (rows[lines].float() @ weights[permutation.expert_of_tile[tile]].float().T).bfloat16()
    return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_references_pass(config: MoEConfig | None):
    pipeline = reference_pipeline(config or AWKWARD)
    check_route(pipeline.route, config=config)
    check_permute(pipeline.permute, config=config)
    check_gemm1(pipeline.gemm1, config=config, takes_swiglu=pipeline.config.gemm1.is_gated, takes_bias=True)
    check_gemm2(pipeline.gemm2, config=config, takes_bias=True)
    check_finalize(pipeline.finalize, config=config)


def test_a_gemm2_of_ones_own_passes():
    check_gemm2(my_gemm2)


def test_a_kernel_without_a_gpu_is_told_where_it_runs():
    def finds_no_driver(rows, weights, permutation):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    with pytest.raises(AssertionError, match=r"gemm2, 0 tokens: RuntimeError: 0 active drivers .* TRITON_INTERPRET=1"):
        check_gemm2(finds_no_driver)


def test_a_stage_that_returns_nothing_is_told_what_was_expected():
    with pytest.raises(AssertionError, match=r"gemm2, 0 tokens: .*expected a tensor \[0, 136\] bfloat16, got NoneType"):
        check_gemm2(lambda rows, weights, permutation: None)


def reads_the_first_expert(rows, weights, permutation):
    return my_gemm2(rows, weights[:1].expand_as(weights), permutation)


def leaves_the_last_tile(rows, weights, permutation):
    return my_gemm2(rows, weights, replace(permutation, num_tiles=(permutation.num_tiles - 1).clamp(min=0)))


def sums_in_bf16(rows, weights, permutation):
    out = my_gemm2(rows, weights, permutation)
    return (out.float() * 1.03).bfloat16()


def reads_past_the_tiles(rows, weights, permutation):
    weights[permutation.expert_of_tile]
    return my_gemm2(rows, weights, permutation)


def gives_float32(rows, weights, permutation):
    return my_gemm2(rows, weights, permutation).float()


@pytest.mark.parametrize(
    ("gemm2", "says"),
    [
        (reads_the_first_expert, r"gemm2, 1 tokens: AssertionError: relative Frobenius error"),
        (leaves_the_last_tile, r"gemm2, 1 tokens: AssertionError: not finite at \[\[1, 0\]"),
        (sums_in_bf16, r"gemm2, 1 tokens: AssertionError: relative Frobenius error"),
        (reads_past_the_tiles, r"gemm2, .*: IndexError"),
        (gives_float32, r"gemm2, 0 tokens: AssertionError: expected \[0, 136\] bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_gemm2_is_found_and_its_case_named(gemm2, says: str):
    with pytest.raises(AssertionError, match=says):
        check_gemm2(gemm2)


def test_a_finalize_that_adds_padding_is_found():
    def adds_all(rows, topk, permutation, *, output=None):
        picked = rows[permutation.row_of_slot.clamp(min=0).long()].float() * topk.weights[..., None].float()
        result = picked.sum(1).bfloat16()
        return result if output is None else output.copy_(result)

    with pytest.raises(AssertionError, match="finalize, 7 tokens"):
        check_finalize(adds_all)


def test_a_finalize_that_ignores_the_callers_memory_is_found():
    def ignores(rows, topk, permutation, *, output=None):
        return finalize_tokens_reference(rows, topk, permutation, config=AWKWARD.finalize)

    with pytest.raises(AssertionError, match="the caller's memory: AssertionError: expected the result in `output`"):
        check_finalize(ignores)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"row_of_slot": lambda made: made.row_of_slot.clamp(min=0) * 0}, "a row of its own"),
        ({"token_of_row": lambda made: made.token_of_row.clamp(min=0)}, "-1 as the token of padding"),
        ({"expert_of_tile": lambda made: made.expert_of_tile * 0}, "tiles of the slot's expert"),
        ({"num_rows": lambda made: made.num_rows + 1}, "num_rows is tile_rows times num_tiles"),
    ],
    ids=["rows", "tokens", "experts", "count"],
)
def test_a_wrong_permute_is_found(change, says: str):
    def wrong(topk):
        made = plan_permutation_reference(topk, config=AWKWARD.permute)
        return replace(made, **{name: of(made) for name, of in change.items()})

    with pytest.raises(AssertionError, match=says):
        check_permute(wrong)


def test_a_router_that_does_not_record_or_orders_otherwise_is_found():
    right = partial(select_experts_reference, config=AWKWARD.routing)
    with pytest.raises(AssertionError, match="recording: AssertionError: expected the ids in the first T rows"):
        check_route(lambda logits, bias=None, *, replay_out=None: right(logits, bias))

    def backwards(logits, bias=None, *, replay_out=None):
        topk = right(logits, bias, replay_out=replay_out)
        return TopK(topk.expert_ids.flip(1), topk.weights.flip(1))

    with pytest.raises(AssertionError, match="expected the reference's expert_ids"):
        check_route(backwards)


def test_memory_is_poisoned_within_and_not_after():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) > 10**8).all()
        assert (torch.ones(2, dtype=torch.int8).new_empty(2) == 0x5B).all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.empty.__module__ != "moe.testing.poison"


def test_an_activation_without_a_formula_is_refused():
    from enum import IntEnum

    other = IntEnum("Other", {"Added": 77, "is_gated": 0}).Added
    with pytest.raises(ValueError, match=r"Other\.Added \(77\): expected one with a case in .*activated_in_float64"):
        activated_in_float64(torch.ones(1, 4), other, 0)
