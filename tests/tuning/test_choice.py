"""TuningChoice.apply: what the config leaves open is filled, what it names stays."""

from typing import Any

import pytest
from pydantic import ValidationError

from moe import GemmTile, MoEConfig, WeightFormat
from moe.fused.few_tokens.config import FewTokenConfig, FewTokenTiles, MatvecTile
from moe.tuning.buckets import BUCKETS
from moe.tuning.choice import TuningChoice

TILE = GemmTile(block_n=64, block_k=64, num_warps=4, num_stages=3)
OTHER_TILE = GemmTile(block_n=128, block_k=64, num_warps=8, num_stages=2)
MATVEC = MatvecTile(block_n=2, block_k=256, num_warps=2)
OTHER_MATVEC = MatvecTile(block_n=4, block_k=128)
FULL = TuningChoice(
    uses_few_tokens=True,
    slot_tile=MATVEC,
    token_tile=OTHER_MATVEC,
    tile_rows=32,
    gemm1_kernel="portable",
    gemm1_tile=TILE,
    gemm2_kernel="swapped",
    gemm2_tile=OTHER_TILE,
    finalize_block_h=512,
)
# Where each field of a choice goes, and another value that a user may name there.
PLACES: dict[str, tuple[str, str, Any]] = {
    "uses_few_tokens": ("few_tokens", "max_tokens", 3),
    "slot_tile": ("few_tokens", "slot_tile", OTHER_MATVEC),
    "token_tile": ("few_tokens", "token_tile", MATVEC),
    "tile_rows": ("permute", "tile_rows", 64),
    "gemm1_kernel": ("gemm1", "kernel", "wide"),
    "gemm1_tile": ("gemm1", "tile", OTHER_TILE),
    "gemm2_kernel": ("gemm2", "kernel", "wide"),
    "gemm2_tile": ("gemm2", "tile", TILE),
    "finalize_block_h": ("finalize", "block_h", 128),
}
CHAIN = ("tile_rows", "gemm1_kernel", "gemm1_tile", "gemm2_kernel", "gemm2_tile")


def layer(**named: Any) -> MoEConfig:
    """A small layer in which the given places are named explicitly, by field of TuningChoice."""
    config = MoEConfig.create(hidden_size=128, intermediate_size=64, num_experts=8, top_k=2)
    fields = dict(config)
    for name, value in named.items():
        stage, field, _ = PLACES[name]
        fields[stage] = type(fields[stage])(**dict(fields[stage]) | {field: value})
    return MoEConfig(**fields)


def value_at(config: MoEConfig, name: str) -> Any:
    stage, field, _ = PLACES[name]
    return getattr(getattr(config, stage), field)


def as_placed(name: str) -> Any:
    return BUCKETS[-1] if name == "uses_few_tokens" else getattr(FULL, name)


def test_every_field_has_a_place():
    assert set(PLACES) == set(TuningChoice.model_fields)


def test_an_empty_choice_changes_nothing():
    assert TuningChoice().apply(layer()) == layer()


@pytest.mark.parametrize("name", PLACES)
def test_one_field_fills_its_place_and_no_other(name: str):
    tuned = TuningChoice(**{name: getattr(FULL, name)}).apply(layer())
    assert {place: value_at(tuned, place) for place in PLACES} == {
        place: as_placed(place) if place == name else None for place in PLACES
    }


def test_a_full_choice_fills_all_places_and_leaves_the_layer():
    tuned = FULL.apply(layer())
    assert {name: value_at(tuned, name) for name in PLACES} == {name: as_placed(name) for name in PLACES}
    assert (tuned.routing, tuned.gemm1.weight_shape) == (layer().routing, layer().gemm1.weight_shape)


@pytest.mark.parametrize("name", PLACES)
def test_an_explicit_value_wins(name: str):
    explicit = PLACES[name][2]
    assert value_at(FULL.apply(layer(**{name: explicit})), name) == explicit


@pytest.mark.parametrize("name", CHAIN)
def test_a_chain_of_which_another_part_is_named_is_left_to_the_model(name: str):
    tuned = FULL.apply(layer(**{name: PLACES[name][2]}))
    others = [other for other in CHAIN if other != name]
    assert [value_at(tuned, other) for other in others] == [None] * len(others)
    assert tuned.finalize.block_h == 512


@pytest.mark.parametrize("name", CHAIN)
def test_naming_what_was_chosen_anyway_keeps_the_chain(name: str):
    tuned = FULL.apply(layer(**{name: getattr(FULL, name)}))
    assert {other: value_at(tuned, other) for other in CHAIN} == {other: getattr(FULL, other) for other in CHAIN}


def test_a_layer_that_was_used_before_is_filled_alike():
    config = layer()
    assert config.gemm1.weight_shape == (8, 128, 128)  # a cached property, from now on beside the fields
    assert TuningChoice(gemm1_kernel="wide").apply(config).gemm1.kernel == "wide"


def test_few_token_kernels_that_are_not_used_are_off():
    assert TuningChoice(uses_few_tokens=False).apply(layer()).few_tokens == FewTokenTiles(max_tokens=0)


def test_few_token_kernels_that_are_used_run_for_any_count_of_a_bucket():
    config = TuningChoice(uses_few_tokens=True).apply(layer())
    model = FewTokenConfig(num_experts=8, top_k=2, gemm1=config.gemm1, gemm2=config.gemm2).max_tokens
    assert config.few_tokens.max_tokens == BUCKETS[-1] > model


def test_validators_run_on_what_is_filled_in():
    narrow = GemmTile(block_n=16, block_k=64, num_warps=4, num_stages=2)
    config = MoEConfig.create(
        hidden_size=128,
        intermediate_size=64,
        num_experts=8,
        top_k=2,
        activation="Relu2",
        weight_format=WeightFormat(is_shuffled=True),
    )
    with pytest.raises(ValueError, match="expected at least 32 for shuffled weights, got 16"):
        TuningChoice(gemm1_tile=narrow).apply(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"tile_rows": 24},
        {"tile_rows": 256},
        {"gemm1_kernel": "fast"},
        {"uses_few_tokens": 1},
        {"finalize_block_h": 32},
        {"x": 1},
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        TuningChoice(**fields)


def test_a_choice_comes_back_from_json():
    assert TuningChoice.model_validate_json(FULL.model_dump_json(exclude_none=True)) == FULL
