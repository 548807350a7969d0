"""Configs as keys: equal ones hash alike, however they came about."""

import copy
import pickle

import numpy as np
import pytest
import torch

from moe import MoEConfig


def layer(top_k: int = 2) -> MoEConfig:
    return MoEConfig.create(hidden_size=128, intermediate_size=64, num_experts=8, top_k=top_k)


def test_equal_configs_are_one_key_and_others_are_not():
    config = layer()
    hash(config)
    found = {config: "first"}
    assert found[layer()] == "first"
    assert found[MoEConfig.model_validate_json(config.model_dump_json())] == "first"
    assert layer(top_k=3) not in found


def test_the_kept_hash_stays_in_its_process():
    config = layer()
    before = pickle.dumps(config)
    hash(config)
    assert pickle.dumps(config) == before
    assert hash(pickle.loads(before)) == hash(config)


def test_a_hash_changes_neither_equality_nor_what_is_dumped():
    hashed, fresh = layer(), layer()
    hash(hashed)
    assert hashed == fresh
    assert hashed.model_dump() == fresh.model_dump()
    assert repr(hashed) == repr(fresh)


def test_equality_is_of_type_and_values_whether_asked_before_or_not():
    one, same, other = layer(), layer(), layer(top_k=3)
    for _ in range(2):
        assert one == same
        assert one != other
        assert other != same
        assert one.gemm1 != one.gemm2
        assert one.gemm1 != one
        assert one != one.model_dump()


def test_what_a_config_computes_and_keeps_is_no_part_of_it():
    used, fresh = layer().gemm1, layer().gemm1
    assert used.weight_shape == (8, 128, 128)
    assert "weight_shape" in used.__dict__
    assert used == fresh


def test_a_copy_computes_anew_what_follows_from_its_values():
    config = layer().gemm1
    assert config.weight_shape == (8, 128, 128)
    assert config.model_copy(update={"num_experts": 4}).weight_shape == (4, 128, 128)
    assert config.model_copy() == config


def test_a_copy_is_refused_what_a_new_config_is():
    with pytest.raises(ValueError, match="in_features"):
        layer().gemm1.model_copy(update={"in_features": 7})
    with pytest.raises(ValueError, match="num_expert"):
        layer().gemm1.model_copy(update={"num_expert": 4})


def test_a_copy_with_another_value_is_not_equal_after_the_first_was_compared():
    config = layer().gemm1
    assert config == layer().gemm1
    changed = config.model_copy(update={"num_experts": 9})
    assert changed != config
    assert hash(changed) != hash(config)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


NUMBERS = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_experts": 8,
    "top_k": 2,
    "method": 2,
    "n_group": 4,
    "topk_group": 2,
    "activation": 6,
    "local_expert_offset": 4,
    "num_local_experts": 4,
    "tile_rows": 32,
}


@pytest.mark.parametrize("wrap", [np.int64, np.array, torch.tensor], ids=["numpy", "array", "tensor"])
def test_a_config_takes_numbers_as_engines_pass_them(wrap):
    plain = MoEConfig.create(**NUMBERS, routed_scaling_factor=2.5)
    wrapped = {name: wrap(value) for name, value in NUMBERS.items()}
    config = MoEConfig.create(**wrapped, routed_scaling_factor=np.float32(2.5))
    assert config == plain
    assert config.model_dump_json() == plain.model_dump_json()
    assert MoEConfig.create(**wrapped, routed_scaling_factor=torch.tensor(2.5)) == plain


@pytest.mark.parametrize("name", [*NUMBERS, "routed_scaling_factor"])
@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)], ids=["bool", "numpy", "tensor"])
def test_a_config_refuses_a_bool_for_a_number(name, value):
    with pytest.raises(ValueError, match="got"):
        MoEConfig.create(**{**NUMBERS, name: value})
