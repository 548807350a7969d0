"""portable_gemm1 and portable_gemm2 against float64, in Triton's interpreter or on the GPU: the contract, and their own tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm.cases import ALL_FORMATS, format_id, make_case
from gemm.family import Family, Problem, activations_of

from moe.flow import SwigluParams
from moe.gemm.config import FLASHINFER, GemmTile, WeightFormat
from moe.testing.closeness import assert_rounded_once

pytest.importorskip("triton")
from gemm.contract import *  # noqa: F403

from moe.gemm.portable.gemm1 import portable_gemm1
from moe.gemm.portable.gemm2 import portable_gemm2
from moe.gemm.portable.tile import candidate_tiles, default_tile

MAJOR_MN = WeightFormat(layout="MajorMn")
FAMILY = Family(
    gemm1=portable_gemm1,
    gemm2=portable_gemm2,
    activations=activations_of("portable"),
    few_activations=("Swiglu", "Relu2"),
    bias_dtypes=(torch.bfloat16, torch.float32),
    formats=ALL_FORMATS,
    tile_rows=(16, 32, 64, 128),
    few_tile_rows=(16,),
    format_tile_rows=(16,),
    format_dims=[(192, 96)],  # two blocks of columns, the second one ragged
    awkward_dims=[(8, 8), (40, 72), (264, 40), (72, 264)],
    awkward_formats=(WeightFormat(), MAJOR_MN),
    usual_dims=(320, 96),
    usual_formats=(WeightFormat(), FLASHINFER),
    loads={"edges_of_tiles": [1, 16, 0, 17], "several_tiles": [37, 0, 20], "nobody": [0, 0]},
    reads_padding_tokens=False,
)


@pytest.fixture
def gemm_device(triton_device: torch.device) -> torch.device:
    return triton_device


@pytest.fixture
def gemm_gpu(cuda: torch.device) -> torch.device:
    return cuda


def test_parameters_of_swiglu_are_not_rounded_to_bf16(gemm_device, poisoned_memory):
    # Halfway between two numbers of bf16.
    swiglu = SwigluParams(
        alpha=torch.tensor([1.699, 0.502, 1.004], device=gemm_device),
        beta=torch.tensor([1.004, -0.251, 0.0], device=gemm_device),
        clamp_limit=torch.tensor([0.502, 7.015, -1.004], device=gemm_device),
    )
    case = FAMILY.case(Problem("Swiglu", (128, 32), WeightFormat()), num_tokens=12, seed=3, device=gemm_device)
    assert_rounded_once(case.by_slot(FAMILY.run(case, swiglu)), case.exact(swiglu))


@pytest.mark.parametrize("weight_format", [WeightFormat(layout="MajorMn", is_shuffled=True), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
def test_shuffled_weights_may_have_a_single_block_of_rows(gemm_device, poisoned_memory, activation, weight_format):
    out_features = 16 if activation == "Swiglu" else 32
    FAMILY.assert_is_close(
        make_case(
            in_features=64,
            out_features=out_features,
            activation=activation,
            weight_format=weight_format,
            device=gemm_device,
        )
    )


@pytest.mark.parametrize("group_tiles", [1, 3, 64])
def test_the_order_of_tiles_does_not_change_results(gemm_device, group_tiles):
    tile = GemmTile(block_n=32, block_k=64, num_warps=4, num_stages=2, group_tiles=group_tiles)
    arguments = {"in_features": 64, "out_features": 96, "num_tokens": 40, "num_experts": 5, "device": gemm_device}
    case = make_case(**arguments, tile=tile)
    assert int(case.permutation.num_tiles) % 3, "the last group should be ragged"
    FAMILY.assert_is_close(case)
    assert torch.equal(case.by_slot(FAMILY.run(case)), case.by_slot(FAMILY.run(make_case(**arguments))))


@pytest.mark.parametrize("in_features", [1088, 1096])
@pytest.mark.parametrize("activation", ["Swiglu", None])
def test_deep_pipelines_take_long_contractions_that_128_does_not_divide(
    gemm_device, poisoned_memory, activation, in_features
):
    case = make_case(
        in_features=in_features,
        out_features=144,
        activation=activation,
        num_tokens=9,
        num_experts=2,
        device=gemm_device,
    )
    assert default_tile(case.config, case.permutation.tile_rows).num_stages == 6
    FAMILY.assert_is_close(case)


REAL_DIMS = [(2048, 768), (2688, 1856), (2880, 2880), (4096, 192), (7168, 704)]


@pytest.mark.parametrize(
    ("tile_rows", "weight_format"),
    [(16, FLASHINFER), (64, MAJOR_MN), (128, FLASHINFER)],
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
    FAMILY.assert_is_close(
        make_case(in_features=hidden_size, out_features=intermediate_size, activation="Swiglu", **arguments)
    )
    FAMILY.assert_is_close(make_case(in_features=intermediate_size, out_features=hidden_size, **arguments))


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
        FAMILY.assert_is_close(replace(case, config=config))


@pytest.mark.parametrize("weight_format", [WeightFormat(), MAJOR_MN], ids=format_id)
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
    FAMILY.assert_is_close(replace(case, config=config, rows=rows, weights=weights, logical=logical))


def test_hidden_states_may_have_more_than_2_31_elements(cuda):
    num_tokens, hidden_size = 300_000, 7168
    expert_ids = torch.full((num_tokens, 1), -1)
    expert_ids[-20:] = 1
    small = make_case(in_features=hidden_size, out_features=64, activation="Swiglu", num_tokens=1, device=cuda)
    case = make_case(in_features=64, out_features=64, activation="Swiglu", expert_ids=expert_ids, device=cuda)
    rows = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device=cuda)
    assert rows.numel() > 1 << 31
    rows[-20:] = torch.randn(20, hidden_size, generator=torch.Generator(device=cuda).manual_seed(0), device=cuda)
    FAMILY.assert_is_close(replace(small, rows=rows, permutation=case.permutation, expert_ids=case.expert_ids))
