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
    tiles = candidate_tiles(config, tile_rows)
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert tile.block_n == 32
        assert tile.block_k == 64, "192 is no multiple of 128"
        GemmConfig(**dict(config) | {"tile": tile})


def test_a_tile_of_the_config_stays_but_for_its_stages():
    config = config_of(2048, 768, None, WeightFormat())
    tile = GemmTile(block_n=256, block_k=128, num_warps=8, num_stages=4)
    fitted = fit_stages(config, tile, 128, SHARED_LIMIT_OF_ARCH[90])
    assert fitted == GemmTile(block_n=256, block_k=128, num_warps=8, num_stages=2)


@pytest.mark.parametrize("tile_rows", [16, 32])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
@pytest.mark.parametrize("in_features", [1088, 1856, 2880, 4160])
def test_few_rows_take_deep_pipelines_where_only_steps_of_128_bytes_divide_a_contraction(
    in_features, activation, tile_rows
):
    config = config_of(in_features, 2048, activation, WeightFormat())
    tile = default_tile(config, tile_rows)
    weight_rows = tile.block_n * (2 if config.is_gated else 1)
    assert (weight_rows, tile.block_k, tile.num_warps, tile.num_stages) == (128, 64, 4, 6)
    assert fit_stages(config, tile, tile_rows, SHARED_LIMIT_OF_ARCH[90]) == tile


@pytest.mark.parametrize(
    "arch", [arch for arch, limit in SHARED_LIMIT_OF_ARCH.items() if limit < SHARED_LIMIT_OF_ARCH[90]]
)
def test_small_shared_memory_keeps_several_programs_on_a_multiprocessor(arch):
    config = config_of(2880, 2880, "Swiglu", WeightFormat())
    tile = default_tile(config, 16, SHARED_LIMIT_OF_ARCH[arch])
    assert (tile.block_n, tile.block_k, tile.num_stages) == (32, 64, 4)


@pytest.mark.parametrize(
    ("in_features", "block_k", "num_stages"),
    [(4096, 256, 3), (4224, 128, 4), (6528, 128, 4), (2048, 128, 4), (1408, 128, 4), (832, 64, 4), (256, 64, 3)],
)
def test_gemm2_of_few_rows_takes_the_widest_steps_that_divide_its_contraction(in_features, block_k, num_stages):
    tile = default_tile(config_of(in_features, 2048, None, WeightFormat()), 16)
    assert (tile.block_k, tile.num_stages) == (block_k, num_stages)


def test_a_search_may_go_back_to_narrow_programs_where_the_default_is_deep():
    config = config_of(2880, 2880, "Swiglu", WeightFormat())
    tiles = [(tile.block_n, tile.block_k, tile.num_stages) for tile in candidate_tiles(config, 32)]
    assert tiles[0] == (64, 64, 6)
    assert (32, 64, 4) in tiles
    assert tiles[-1] == (32, 64, 8)
