"""Tiles fit the shape and the GPU's shared memory."""

from __future__ import annotations

import pytest
from emulation.gpu_limits import SHARED_LIMIT_OF_ARCH

from moe.gemm.config import FLASHINFER, GemmConfig, GemmTile, WeightFormat
from moe.gemm.portable.tile import candidate_tiles, default_tile, fit_stages

FORMATS = [WeightFormat(), FLASHINFER]


def config_of(in_features: int, out_features: int, activation: str | None, weight_format: WeightFormat) -> GemmConfig:
    return GemmConfig(
        num_experts=8,
        in_features=in_features,
        out_features=out_features,
        activation=activation,
        weight_format=weight_format,
    )


@pytest.mark.parametrize("arch", SHARED_LIMIT_OF_ARCH)
@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
def test_every_tile_keeps_a_pipeline_within_shared_memory(activation, tile_rows, arch):
    config = config_of(2048, 768, activation, FLASHINFER)
    limit = SHARED_LIMIT_OF_ARCH[arch]
    for tile in (default_tile(config, tile_rows, limit), *candidate_tiles(config, tile_rows)):
        fitted = fit_stages(config, tile, tile_rows, limit)
        assert 2 <= fitted.num_stages <= tile.num_stages
        assert GemmTile(**fitted.model_dump() | {"num_stages": tile.num_stages}) == tile


@pytest.mark.parametrize("weight_format", FORMATS, ids=["MajorK", "flashinfer"])
@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
def test_tiles_are_no_wider_than_small_outputs_and_fit_the_config(activation, tile_rows, weight_format):
    config = config_of(192, 32, activation, weight_format)
    for tile in candidate_tiles(config, tile_rows):
        assert tile.block_n == 32
        assert tile.block_k == 64, "192 is no multiple of 128"
        GemmConfig(**dict(config) | {"tile": tile})


def test_a_tile_of_the_config_stays_but_for_its_stages():
    config = config_of(2048, 768, None, WeightFormat())
    tile = GemmTile(block_n=256, block_k=128, num_warps=8, num_stages=4)
    fitted = fit_stages(config, tile, 128, SHARED_LIMIT_OF_ARCH[90])
    assert fitted == GemmTile(block_n=256, block_k=128, num_warps=8, num_stages=2)
