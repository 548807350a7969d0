"""Hopper's kernel of weight gradients, on one: the contract; what it leaves to the portable one needs none."""

from __future__ import annotations

import pytest
import torch

from moe.gemm.config import GemmConfig, WeightFormat

pytest.importorskip("triton")
from gemm.backward.stage_tests import *  # noqa: F403
from gemm.backward.stage_tests import assert_is_close, make_inputs

from moe.gemm.backward.hopper_wgrad import fits_wgrad, launch_hopper_gemm1_wgrad, launch_hopper_gemm2_wgrad

STAGES = {
    "gemm1_wgrad": launch_hopper_gemm1_wgrad,
    "gemm2_wgrad": launch_hopper_gemm2_wgrad,
}
ACTIVATIONS = ("Swiglu",)
FORMATS = [WeightFormat(), WeightFormat(gate_up_order="up_gate")]
TILE_ROWS = (64, 128)
DIMS = [
    {"hidden_size": 256, "intermediate_size": 192},
    {"hidden_size": 128, "intermediate_size": 64},
    {"hidden_size": 640, "intermediate_size": 320},
]


@pytest.fixture
def backward_device(hopper: torch.device) -> torch.device:
    return hopper


@pytest.fixture
def backward_gpu(hopper: torch.device) -> torch.device:
    return hopper


@pytest.mark.parametrize("name", ["gemm1_wgrad", "gemm2_wgrad"])
@pytest.mark.parametrize("dims", DIMS[::2], ids=["256x192", "640x320"])
def test_weight_gradients_of_the_other_layout(hopper, poisoned_memory, name, dims):
    arguments = dims | {"intermediate_size": 384, "weight_format": WeightFormat(layout="MajorMn"), "tile_rows": 64}
    assert_is_close(STAGES, name, make_inputs([63, 64, 65, 0, 200, 1], hopper, **arguments))


@pytest.mark.parametrize("dims", [(2048, 768), (4096, 1408), (1536, 256)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_dims_of_real_models_and_many_pieces_of_work(hopper, poisoned_memory, stage, dims):
    hidden_size, intermediate_size = dims
    loads = [700, 333, 0, 1290, 5, 64, 128, 2000]
    arguments = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "tile_rows": 128}
    assert_is_close(STAGES, stage, make_inputs(loads, hopper, **arguments))


def gemm1_config(hidden_size: int, intermediate_size: int, **more: object) -> GemmConfig:
    fields = {"num_experts": 4, "in_features": hidden_size, "out_features": intermediate_size, "activation": "Swiglu"}
    return GemmConfig(**fields | more)


@pytest.mark.parametrize("tile_rows", [16, 32])
def test_tiles_of_few_rows_are_left_to_the_portable_kernels(tile_rows):
    gemm1 = gemm1_config(256, 128)
    gemm2 = GemmConfig(num_experts=4, in_features=128, out_features=256)
    assert not fits_wgrad(gemm1, tile_rows)
    assert not fits_wgrad(gemm2, tile_rows)


@pytest.mark.parametrize(
    ("gemm1", "fits"),
    [
        (gemm1_config(256, 192), True),
        (gemm1_config(192, 192), False),  # blocks of gathered columns are 128 wide
        (gemm1_config(256, 96), False),  # 192 rows of W1: a block of 128 would reach into the next expert
        (gemm1_config(256, 96, weight_format=WeightFormat(layout="MajorMn")), True),
    ],
    ids=str,
)
def test_weight_gradients_whose_blocks_would_reach_into_the_next_expert_are_left_to_the_portable_kernels(gemm1, fits):
    assert fits_wgrad(gemm1, 64) == fits
