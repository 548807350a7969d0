"""The tiles that the few-token kernels have where a config names none."""

from __future__ import annotations

import pytest

from moe.fused.few_tokens.config import MatvecTile
from moe.fused.few_tokens.tile import default_slot_tile, default_token_tile
from moe.gemm.config import GemmConfig


def all_tiles(in_features: int) -> list[MatvecTile]:
    def gemm(activation: str | None) -> GemmConfig:
        return GemmConfig(num_experts=8, in_features=in_features, out_features=2048, activation=activation)

    tiles = [default_slot_tile(gemm(activation)) for activation in ("Swiglu", "Relu2")]
    for top_k in (1, 2, 8):
        tiles += [default_token_tile(gemm(None), top_k, is_slice=is_slice) for is_slice in (False, True)]
    return tiles


@pytest.mark.parametrize("in_features", [256, 768, 1536, 2048, 4096, 7168, 14336])
def test_rows_that_warps_load_whole_are_cut_into_whole_steps(in_features):
    assert [in_features % tile.block_k for tile in all_tiles(in_features)] == [0] * 8


@pytest.mark.parametrize(("in_features", "longest"), [(8, 64), (64, 64), (72, 128), (200, 256)])
def test_steps_of_short_rows_are_no_longer_than_the_row_needs(in_features, longest):
    assert max(tile.block_k for tile in all_tiles(in_features)) <= longest


@pytest.mark.parametrize("in_features", [768, 1000, 2048, 7168])
def test_a_slice_of_many_choices_loads_nothing_ahead(in_features):
    gemm2 = GemmConfig(num_experts=8, in_features=in_features, out_features=2048)
    assert default_token_tile(gemm2, 8, is_slice=True).num_prefetched == 0
    assert default_token_tile(gemm2, 8, is_slice=False).num_prefetched > 0
