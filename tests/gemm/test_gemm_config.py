"""What GemmConfig itself refuses."""

from __future__ import annotations

import pytest

from moe.gemm.config import ACTIVATIONS, FLASHINFER, ActivationType, GemmConfig, GemmTile


def test_a_tile_narrower_than_a_shuffled_block_is_refused():
    tile = GemmTile(block_n=16, block_k=64, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=r"tile\.block_n: expected at least 32 for shuffled weights, got 16"):
        GemmConfig(num_experts=1, in_features=64, out_features=64, weight_format=FLASHINFER, tile=tile)


def test_an_expert_of_2_31_weights_is_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements"):
        GemmConfig(num_experts=1, in_features=1 << 16, out_features=1 << 15)


def test_no_family_takes_an_activation_that_the_portable_one_does_not():
    for activations in ACTIVATIONS.values():
        assert set(activations) <= set(ACTIVATIONS["portable"])


@pytest.mark.parametrize("family", ["swapped", "wide"])
def test_families_of_hopper_take_every_activation_but_one(family):
    assert set(ACTIVATIONS["portable"]) - set(ACTIVATIONS[family]) == {ActivationType.Situ}
