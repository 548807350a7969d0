"""What GemmConfig itself refuses."""

from __future__ import annotations

import pytest

from moe.gemm.config import FLASHINFER, GemmConfig, GemmTile


def test_a_tile_narrower_than_a_shuffled_block_is_refused():
    tile = GemmTile(block_n=16, block_k=64, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=r"tile\.block_n: expected at least 32 for shuffled weights, got 16"):
        GemmConfig(num_experts=1, in_features=64, out_features=64, weight_format=FLASHINFER, tile=tile)


def test_an_expert_of_2_31_weights_is_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements"):
        GemmConfig(num_experts=1, in_features=1 << 16, out_features=1 << 15)
