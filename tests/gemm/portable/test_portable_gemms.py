"""portable_gemm1 and portable_gemm2 against float64, in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import assert_close_to_exact, assert_rounded_once
from gemm.cases import ALL_FORMATS, UNGATED_FORMATS, GemmCase, format_id, make_case
from torch import Tensor

from moe.flow import SwigluParams
from moe.gemm.config import FLASHINFER, GemmTile, WeightFormat
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference

pytest.importorskip("triton")
from moe.gemm.portable.gemm1 import portable_gemm1
from moe.gemm.portable.gemm2 import portable_gemm2
from moe.gemm.portable.tile import candidate_tiles


def run_kernel(case: GemmCase, swiglu: SwigluParams | None = None) -> Tensor:
    if case.config.activation is None:
        return portable_gemm2(case.rows, case.weights, case.permutation, config=case.config)
    return portable_gemm1(case.rows, case.weights, case.permutation, config=case.config, swiglu=swiglu)


def run_reference(case: GemmCase, swiglu: SwigluParams | None = None) -> Tensor:
    if case.config.activation is None:
        return grouped_gemm_reference(case.rows, case.weights, case.permutation, config=case.config)
    return gather_gemm_reference(case.rows, case.weights, case.permutation, config=case.config, swiglu=swiglu)


def assert_kernel_is_close(case: GemmCase, swiglu: SwigluParams | None = None) -> None:
    exact = case.exact(swiglu)
    actual, reference = (case.by_slot(run(case, swiglu)) for run in (run_kernel, run_reference))
    assert_close_to_exact(actual.flatten(0, 1), reference.flatten(0, 1), exact.flatten(0, 1))


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
def test_gemm1_with_swiglu_reads_every_weight_format(triton_device, poisoned_memory, weight_format):
    # 80 columns: two column blocks, the second one ragged.
    assert_kernel_is_close(
        make_case(
            in_features=192, out_features=80, activation="Swiglu", weight_format=weight_format, device=triton_device
        )
    )


@pytest.mark.parametrize("weight_format", UNGATED_FORMATS, ids=format_id)
def test_gemm1_with_relu2_reads_every_weight_format(triton_device, poisoned_memory, weight_format):
    assert_kernel_is_close(
        make_case(
            in_features=128, out_features=160, activation="Relu2", weight_format=weight_format, device=triton_device
        )
    )


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
def test_gemm2_reads_every_weight_format(triton_device, poisoned_memory, weight_format):
    assert_kernel_is_close(
        make_case(in_features=192, out_features=160, weight_format=weight_format, device=triton_device)
    )


@pytest.mark.parametrize("weight_format", [WeightFormat(), WeightFormat(layout="MajorMn")], ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (40, 72), (264, 40), (72, 264)])
def test_dims_need_only_be_multiples_of_8(
    triton_device, poisoned_memory, in_features, out_features, activation, weight_format
):
    assert_kernel_is_close(
        make_case(
            in_features=in_features,
            out_features=out_features,
            activation=activation,
            weight_format=weight_format,
            num_tokens=5,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("weight_format", [WeightFormat(layout="MajorMn", is_shuffled=True), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
def test_shuffled_weights_may_have_a_single_block_of_rows(triton_device, poisoned_memory, activation, weight_format):
    out_features = 16 if activation == "Swiglu" else 32
    assert_kernel_is_close(
        make_case(
            in_features=64,
            out_features=out_features,
            activation=activation,
            weight_format=weight_format,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("activation", ["Swiglu", None])
@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_one_expert_may_take_every_token(triton_device, poisoned_memory, tile_rows, activation):
    # Three tiles and a bit of the middle expert; its neighbours have no rows.
    expert_ids = torch.ones(2 * tile_rows + 3, 1)
    assert_kernel_is_close(
        make_case(
            in_features=128,
            out_features=64,
            activation=activation,
            expert_ids=expert_ids,
            tile_rows=tile_rows,
            weight_format=FLASHINFER,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("activation", ["Swiglu", None])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_few_tokens_leave_most_experts_without_rows(triton_device, poisoned_memory, num_tokens, activation):
    case = make_case(
        in_features=64,
        out_features=48,
        activation=activation,
        num_tokens=num_tokens,
        num_experts=11,
        device=triton_device,
    )
    assert run_kernel(case).shape == (case.permutation.max_rows, 48)
    assert_kernel_is_close(case)


@pytest.mark.parametrize("activation", ["Swiglu", None])
@pytest.mark.parametrize("local", [slice(0, 2), slice(3, 6), slice(7, 8)], ids=["E0-1", "E3-5", "E7"])
def test_a_rank_computes_the_rows_of_its_own_experts(triton_device, poisoned_memory, local, activation):
    assert_kernel_is_close(
        make_case(
            in_features=64,
            out_features=48,
            activation=activation,
            num_experts=8,
            local=local,
            num_tokens=9,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("activation", ["Swiglu", None])
def test_a_rank_without_any_row_computes_nothing(triton_device, activation):
    case = make_case(
        in_features=64,
        out_features=32,
        activation=activation,
        expert_ids=torch.zeros(3, 1),
        num_experts=4,
        local=slice(2, 4),
        device=triton_device,
    )
    assert int(case.permutation.num_tiles) == 0
    case.weights.fill_(float("nan"))
    assert run_kernel(case).shape == (case.permutation.max_rows, 32)


@pytest.mark.parametrize(
    "names", [(), ("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")], ids=str
)
def test_swiglu_takes_any_of_its_parameters_by_local_expert(triton_device, poisoned_memory, names):
    # Halfway between two numbers of bf16.
    parameters = {
        "alpha": torch.tensor([1.699, 0.502, 1.004]),
        "beta": torch.tensor([1.004, -0.251, 0.0]),
        "clamp_limit": torch.tensor([0.502, 7.015, -1.004]),  # the first and the last clamp much of unit-scale values
    }
    swiglu = SwigluParams(**{name: parameters[name].to(triton_device) for name in names})
    case = make_case(in_features=128, out_features=32, activation="Swiglu", num_tokens=12, seed=3, device=triton_device)
    assert_kernel_is_close(case, swiglu)
    assert_rounded_once(case.by_slot(run_kernel(case, swiglu)), case.exact(swiglu))


@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
def test_sums_that_fp32_holds_exactly_equal_the_reference_bit_for_bit(triton_device, activation, weight_format):
    case = make_case(
        in_features=320,
        out_features=96,
        activation=activation,
        weight_format=weight_format,
        num_tokens=21,
        is_integer=True,
        device=triton_device,
    )
    actual, reference = case.by_slot(run_kernel(case)), case.by_slot(run_reference(case))
    assert torch.equal(actual, reference)
    assert torch.equal(reference, case.exact().to(torch.bfloat16))
    assert actual.unique().numel() > 50


@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_a_token_that_is_nan_spoils_its_own_rows_only(triton_device, activation):
    case = make_case(in_features=64, out_features=32, activation=activation, num_tokens=6, device=triton_device)
    case.rows[2] = float("nan")
    swiglu = None
    if activation == "Swiglu":
        swiglu = SwigluParams(clamp_limit=torch.ones(case.config.num_experts, device=triton_device))
    for run in (run_kernel, run_reference):
        is_nan = case.by_slot(run(case, swiglu)).isnan()
        assert is_nan[2].all()
        assert not is_nan[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("weight_format", [WeightFormat(), WeightFormat(layout="MajorMn")], ids=format_id)
@pytest.mark.parametrize("in_features", [64, 40])
def test_weights_of_experts_that_nobody_chose_are_not_used(triton_device, in_features, weight_format):
    # 40 is less than a step of the contraction: what lies past an expert's weights is its neighbour's.
    arguments = {"in_features": in_features, "weight_format": weight_format, "device": triton_device}
    case = make_case(out_features=24, expert_ids=torch.tensor([[0], [2]]), **arguments)
    case.weights[1] = float("nan")
    assert case.by_slot(run_kernel(case)).isfinite().all()


@pytest.mark.parametrize("group_tiles", [1, 3, 64])
def test_the_order_of_tiles_does_not_change_results(triton_device, group_tiles):
    tile = GemmTile(block_n=32, block_k=64, num_warps=4, num_stages=2, group_tiles=group_tiles)
    arguments = {"in_features": 64, "out_features": 96, "num_tokens": 40, "num_experts": 5, "device": triton_device}
    case = make_case(**arguments, tile=tile)
    assert int(case.permutation.num_tiles) % 3, "the last group should be ragged"
    assert_kernel_is_close(case)
    assert torch.equal(case.by_slot(run_kernel(case)), case.by_slot(run_kernel(make_case(**arguments))))


# GPU only from here on.

REAL_DIMS = [(2048, 768), (2688, 1856), (2880, 2880), (4096, 192), (7168, 704)]


@pytest.mark.parametrize(
    ("tile_rows", "weight_format"),
    [(16, FLASHINFER), (64, WeightFormat(layout="MajorMn")), (128, FLASHINFER)],
    ids=["16rows-flashinfer", "64rows-MajorMn", "128rows-flashinfer"],
)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), REAL_DIMS)
def test_dims_of_real_models(cuda, poisoned_memory, hidden_size, intermediate_size, tile_rows, weight_format):
    arguments = {
        "num_tokens": 3 * tile_rows,
        "num_experts": 6,
        "tile_rows": tile_rows,
        "weight_format": weight_format,
        "device": cuda,
    }
    assert_kernel_is_close(
        make_case(in_features=hidden_size, out_features=intermediate_size, activation="Swiglu", **arguments)
    )
    assert_kernel_is_close(make_case(in_features=intermediate_size, out_features=hidden_size, **arguments))


@pytest.mark.parametrize("activation", ["Swiglu", None])
@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_every_candidate_tile(cuda, poisoned_memory, tile_rows, activation):
    arguments = {
        "in_features": 1024,
        "out_features": 768,
        "activation": activation,
        "num_tokens": 3 * tile_rows,
        "num_experts": 6,
        "tile_rows": tile_rows,
        "weight_format": FLASHINFER,
        "device": cuda,
    }
    case = make_case(**arguments)
    for tile in candidate_tiles(case.config, tile_rows):
        config = case.config.__class__(**dict(case.config) | {"tile": tile})
        assert_kernel_is_close(replace(case, config=config))


@pytest.mark.parametrize("activation", ["Swiglu", None])
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_twenty_runs_give_the_same_bits(cuda, tile_rows, activation):
    case = make_case(
        in_features=2048,
        out_features=768,
        activation=activation,
        num_tokens=500,
        num_experts=16,
        top_k=4,
        tile_rows=tile_rows,
        device=cuda,
    )
    first = case.by_slot(run_kernel(case))
    assert all(torch.equal(case.by_slot(run_kernel(case)), first) for _ in range(19))


def test_a_captured_graph_follows_new_inputs(cuda):
    arguments = {"num_tokens": 64, "num_experts": 8, "tile_rows": 32, "device": cuda}
    old, new = (
        make_case(in_features=512, out_features=256, activation="Swiglu", seed=seed, **arguments) for seed in (1, 2)
    )
    run_kernel(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_kernel(old)
    old.rows.copy_(new.rows)
    old.weights.copy_(new.weights)
    for name in ("token_of_row", "expert_of_tile", "row_limit_of_tile", "num_tiles"):
        getattr(old.permutation, name).copy_(getattr(new.permutation, name))
    graph.replay()
    assert torch.equal(new.by_slot(out), new.by_slot(run_kernel(new)))
    assert_kernel_is_close(new)


@pytest.mark.parametrize("weight_format", [WeightFormat(), WeightFormat(layout="MajorMn")], ids=format_id)
def test_weights_may_have_more_than_2_31_elements(cuda, weight_format):
    num_experts, hidden_size, intermediate_size = 64, 4224, 4096
    last_experts = torch.tensor([[62, 63], [63, 0], [61, 62]])
    case = make_case(in_features=64, out_features=32, expert_ids=last_experts, num_experts=num_experts, device=cuda)
    config = case.config.__class__(
        num_experts=num_experts,
        in_features=hidden_size,
        out_features=intermediate_size,
        activation="Swiglu",
        weight_format=weight_format,
    )
    generator = torch.Generator(device=cuda).manual_seed(0)
    weights = torch.empty(config.weight_shape, dtype=torch.bfloat16, device=cuda)
    assert weights.numel() > 1 << 31
    for of_expert in weights:
        of_expert.normal_(std=hidden_size**-0.5, generator=generator)
    logical = weights if weight_format == WeightFormat() else weights.transpose(1, 2)
    rows = torch.randn(3, hidden_size, generator=generator, device=cuda).to(torch.bfloat16)
    assert_kernel_is_close(replace(case, config=config, rows=rows, weights=weights, logical=logical))


def test_hidden_states_may_have_more_than_2_31_elements(cuda):
    num_tokens, hidden_size = 300_000, 7168
    expert_ids = torch.full((num_tokens, 1), -1)
    expert_ids[-20:] = 1
    small = make_case(in_features=hidden_size, out_features=64, activation="Swiglu", num_tokens=1, device=cuda)
    case = make_case(in_features=64, out_features=64, activation="Swiglu", expert_ids=expert_ids, device=cuda)
    rows = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device=cuda)
    assert rows.numel() > 1 << 31
    rows[-20:] = torch.randn(20, hidden_size, generator=torch.Generator(device=cuda).manual_seed(0), device=cuda)
    assert_kernel_is_close(replace(small, rows=rows, permutation=case.permutation, expert_ids=case.expert_ids))
