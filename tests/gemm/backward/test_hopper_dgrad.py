"""Hopper's kernels of gemm1 that keeps and of gemm2's dgrad, on one: the contract; what they leave to others needs none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.flow import KeptGemm1, Permutation, SwigluParams
from moe.gemm.config import GemmConfig, WeightFormat

pytest.importorskip("triton")
from gemm.backward.stage_tests import *  # noqa: F403
from gemm.backward.stage_tests import assert_is_close, make_inputs, rows_of_slots

from moe.gemm.backward.hopper_dgrad import fits_dgrad, launch_hopper_gemm2_dgrad
from moe.gemm.backward.kernels import keeps_product
from moe.gemm.wide.gemm1 import launch_wide_gemm1


def wide_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    kept = hidden_states.new_empty(permutation.max_rows, config.weight_rows)
    return KeptGemm1(
        launch_wide_gemm1(hidden_states, weights, permutation, config=config, swiglu=swiglu, kept=kept), kept
    )


STAGES = {"gemm1_keeping": wide_gemm1_keeping, "gemm2_dgrad": launch_hopper_gemm2_dgrad}
ACTIVATIONS = ("Swiglu",)
FORMATS = [WeightFormat(), WeightFormat(gate_up_order="up_gate")]
TILE_ROWS = (64, 128)
DIMS = [
    {"hidden_size": 256, "intermediate_size": 200},
    {"hidden_size": 128, "intermediate_size": 8},
    {"hidden_size": 640, "intermediate_size": 328},
]


@pytest.fixture
def backward_device(hopper: torch.device) -> torch.device:
    return hopper


@pytest.fixture
def backward_gpu(hopper: torch.device) -> torch.device:
    return hopper


@pytest.mark.parametrize("dims", [(2048, 768), (4096, 1408), (1536, 256)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_dims_of_real_models_and_many_pieces_of_work(hopper, poisoned_memory, stage, dims):
    hidden_size, intermediate_size = dims
    loads = [700, 333, 0, 1290, 5, 64, 128, 2000]
    arguments = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "tile_rows": 128}
    assert_is_close(STAGES, stage, make_inputs(loads, hopper, **arguments))


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_what_keeps_has_the_bits_of_what_does_not(hopper, poisoned_memory, tile_rows):
    case = make_inputs([700, 0, 333, 1], hopper, **DIMS[2], tile_rows=tile_rows).case
    arguments = (case.hidden_states, case.w1, case.permutation)
    is_real = rows_of_slots(case.permutation)
    kept = wide_gemm1_keeping(*arguments, config=case.config.gemm1)
    assert torch.equal(kept.activation[is_real], launch_wide_gemm1(*arguments, config=case.config.gemm1)[is_real])


def gemm1_config(hidden_size: int, intermediate_size: int, **more: object) -> GemmConfig:
    fields = {"num_experts": 4, "in_features": hidden_size, "out_features": intermediate_size, "activation": "Swiglu"}
    return GemmConfig(**fields | more)


@pytest.mark.parametrize("tile_rows", [16, 32])
def test_tiles_of_few_rows_are_left_to_the_portable_kernel(tile_rows):
    assert not fits_dgrad(
        GemmConfig(num_experts=4, in_features=128, out_features=256), gemm1_config(256, 128), tile_rows
    )


@pytest.mark.parametrize(
    ("hidden_size", "change", "fits"),
    [
        (256, {}, True),
        (264, {}, False),
        (64, {}, False),
        (256, {"activation": "Relu2"}, False),
        (256, {"weight_format": WeightFormat(layout="MajorMn")}, False),
        (256, {"weight_format": WeightFormat(gate_up_order="interleaved")}, False),
    ],
    ids=str,
)
def test_what_dgrad_leaves_to_the_portable_kernel(hidden_size, change, fits):
    gemm1 = gemm1_config(hidden_size, 128, **change)
    formats = {"weight_format": gemm1.weight_format} if gemm1.weight_format.layout.name == "MajorMn" else {}
    gemm2 = GemmConfig(num_experts=4, in_features=128, out_features=hidden_size, **formats)
    assert fits_dgrad(gemm2, gemm1, 128) == fits


@pytest.mark.parametrize(
    ("family", "activation", "keeps"),
    [("wide", "Swiglu", True), ("wide", "Relu2", False), ("swapped", "Swiglu", False), ("portable", "Relu2", True)],
)
def test_the_wide_gemm1_keeps_gate_and_up_and_the_swapped_one_nothing(family, activation, keeps):
    assert keeps_product(family, gemm1_config(256, 128, activation=activation)) == keeps
