"""What MoEConfig takes, what it refuses and in which words, and what the stages must agree on."""

from __future__ import annotations

import pytest
from small_layer import SMALL

import moe
from moe import FLASHINFER, MoEConfig
from moe.permute.config import FinalizeConfig
from moe.routing.config import RoutingConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 100}, "^hidden_size: input should be a multiple of 8, got 100$"),
        ({"intermediate_size": "64"}, "^intermediate_size: input should be a valid integer, got '64'$"),
        ({"activation": "tanh"}, "^activation: expected .*'Gelu' or .*'Swiglu' or .*'Relu2' or .*, got 'tanh'$"),
        ({"activation": 11}, r"Invalid activation type: 11; expected .*0 \(Gelu\) or .*10 \(Situ\)$"),
        ({"tile_rows": 12}, "^tile_rows: expected a power of two, got 12"),
        ({"num_local_experts": 0}, "num_local_experts: input should be greater than or equal to 1, got 0$"),
        ({"method": "best"}, "^method: input should be .* got 'best'$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_numbers_are_named_as_the_caller_knows_them(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.create(**SMALL | wrong)


@pytest.mark.parametrize("wrong", [{"top_k": "2"}, {"top_k": True}, {"num_experts": 8.0}, {"tile_rows": "16"}], ids=str)
def test_counts_that_are_no_integers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MoEConfig.create(**SMALL | wrong)


def test_activations_go_by_any_case() -> None:
    assert MoEConfig.create(**SMALL, activation="swiglu") == MoEConfig.create(**SMALL, activation="Swiglu")


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("routing", {"num_experts": 9}, "routing.num_experts=9 but permute.num_experts=8"),
        ("routing", {"top_k": 3}, "routing.top_k=3 but permute.top_k=2"),
        ("gemm1", {"num_experts": 7}, "permute.num_local_experts=8 but gemm1.num_experts=7"),
        ("gemm2", {"num_experts": 7}, "permute.num_local_experts=8 but gemm2.num_experts=7"),
        ("gemm2", {"in_features": 72}, "gemm1.out_features=64 but gemm2.in_features=72"),
        ("gemm2", {"out_features": 136}, "gemm1.in_features=128 but gemm2.out_features=136"),
        ("gemm2", {"activation": "Relu2"}, "gemm2.activation: expected None, got Relu2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stages_that_disagree_are_refused_with_both_values(stage: str, change: dict[str, object], message: str) -> None:
    fields = MoEConfig.create(**SMALL).model_dump()
    with pytest.raises(ValueError, match=message):
        MoEConfig(**fields | {stage: fields[stage] | change})


def test_a_first_gemm_without_activation_is_refused() -> None:
    fields = MoEConfig.create(**SMALL, activation="Relu2").model_dump()
    with pytest.raises(ValueError, match=r"gemm1\.activation: expected .*Gelu or .*Swiglu or .*, got None"):
        MoEConfig(**fields | {"gemm1": fields["gemm1"] | {"activation": None}})


def test_a_layer_of_four_numbers_renormalises_and_is_gated() -> None:
    config = MoEConfig.create(**SMALL)
    assert config.routing == RoutingConfig(num_experts=8, top_k=2, method="Renormalize")
    assert config.gemm1.is_gated


def test_config_survives_json() -> None:
    config = MoEConfig.create(**SMALL, method=2, weight_format=FLASHINFER, num_local_experts=4)
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(MoEConfig.model_validate_json(config.model_dump_json()))


@pytest.mark.parametrize(
    ("num_local", "asked", "is_sparse"),
    [(1, None, True), (2, None, True), (3, None, None), (8, None, None), (2, False, False), (8, True, True)],
)
def test_finalize_of_a_slice_of_a_quarter_or_less_is_sparse_unless_told_otherwise(num_local, asked, is_sparse) -> None:
    numbers = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2}
    config = MoEConfig.create(**numbers, num_local_experts=num_local)
    config = config.model_copy(update={"finalize": FinalizeConfig(block_h=512, is_sparse=asked)})
    assert config.summed == FinalizeConfig(block_h=512, is_sparse=is_sparse)


def test_what_a_config_prints_evaluates_to_it() -> None:
    config = MoEConfig.create(**SMALL, method=2, weight_format=FLASHINFER, swiglu=moe.SwigluNumbers(alpha=1.5))
    tiles = moe.FewTokenTiles(max_tokens=3, slot_tile=moe.MatvecTile(block_n=2, block_k=64))
    tiled = config.gemm2.model_copy(update={"tile": moe.GemmTile(block_n=32, block_k=64, num_warps=4, num_stages=2)})
    config = config.model_copy(update={"few_tokens": tiles, "gemm2": tiled})
    assert eval(repr(config), {name: getattr(moe, name) for name in moe.__all__}) == config  # from moe import *


def test_a_batch_invariant_config_leaves_nothing_to_the_number_of_tokens() -> None:
    config = MoEConfig.create(**SMALL, is_batch_invariant=True)
    assert config.permute.tile_rows == 16
    assert MoEConfig.create(**SMALL, tile_rows=64, is_batch_invariant=True).permute.tile_rows == 64
    assert config.gemm1.kernel == config.gemm2.kernel == "swapped"
    assert config.few_tokens.max_tokens == 0
    assert MoEConfig.model_validate_json(config.model_dump_json()) == config
