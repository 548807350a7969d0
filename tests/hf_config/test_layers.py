"""Models whose layers differ: one layer's config, and a refusal that names the layers where none is asked for."""

from __future__ import annotations

import pytest

from moe.config import MoEConfig
from moe.gemm.config import SwigluNumbers

QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "hidden_size": 64,
    "moe_intermediate_size": 40,
    "n_group": 1,
    "n_routed_experts": 16,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}
STEP = DEEPSEEK | {"model_type": "step3p5", "moe_router_scaling_factor": 3.0, "swiglu_limits": [0, None, 7.0, 0.0]}
del STEP["routed_scaling_factor"]


def numbers(layer: MoEConfig) -> tuple[int, int, int, str]:
    return layer.num_experts, layer.top_k, layer.intermediate_size, layer.routing.method.value


@pytest.mark.parametrize(
    ("own", "of_layer_1", "words"),
    [
        (
            {"moe_intermediate_size": 24},
            (8, 2, 24, "Renormalize"),
            "intermediate_size is 40 in layers 0 and 2 to 3, 24 in layer 1",
        ),
        ({"num_experts": 4}, (4, 2, 40, "Renormalize"), "num_experts is 8 in layers 0 and 2 to 3, 4 in layer 1"),
        ({"num_local_experts": 4}, (4, 2, 40, "Renormalize"), "num_experts is 8 in layers 0 and 2 to 3, 4 in layer 1"),
        ({"num_experts_per_tok": 3}, (8, 3, 40, "Renormalize"), "top_k is 2 in layers 0 and 2 to 3, 3 in layer 1"),
        (
            {"norm_topk_prob": False},
            (8, 2, 40, "Default"),
            "method is 'Renormalize' in layers 0 and 2 to 3, 'Default' in layer 1",
        ),
    ],
    ids=["I", "E", "E-by-another-name", "K", "rule"],
)
@pytest.mark.parametrize("number", [1, "1", "01"], ids=repr)
def test_a_layer_with_keys_of_its_own(own, of_layer_1, words, number) -> None:
    config = QWEN3 | {"per_layer_config": {number: own}}
    assert numbers(MoEConfig.from_hf_config(config, layer=1)) == of_layer_1
    assert MoEConfig.from_hf_config(config, layer=2) == MoEConfig.from_hf_config(QWEN3)
    with pytest.raises(ValueError, match=f"'qwen3_moe': its layers differ: {words}; pass layer="):
        MoEConfig.from_hf_config(config)


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("num_experts", [8, 4, 8, 16], "num_experts is 8 in layers 0 and 2, 4 in layer 1, 16 in layer 3"),
        ("num_experts_per_tok", [2, 1, 2, 2], "top_k is 2 in layers 0 and 2 to 3, 1 in layer 1"),
        ("moe_intermediate_size", [40, 24, 40, 40], "intermediate_size is 40 in layers 0 and 2 to 3, 24 in layer 1"),
        ("norm_topk_prob", [True, False, True, True], "method is 'Renormalize' in layers 0 and 2 to 3, 'Default' in"),
    ],
    ids=["E", "K", "I", "rule"],
)
def test_a_list_by_layer(key, values, words) -> None:
    config = QWEN3 | {key: values}
    for layer, value in enumerate(values):
        assert MoEConfig.from_hf_config(config, layer=layer) == MoEConfig.from_hf_config(QWEN3 | {key: value})
    with pytest.raises(ValueError, match=f"its layers differ: {words}"):
        MoEConfig.from_hf_config(config)
    alike = QWEN3 | {key: values[:1] * 4}
    assert MoEConfig.from_hf_config(alike) == MoEConfig.from_hf_config(QWEN3)


def test_a_list_that_is_not_of_one_value_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_experts: expected one value, or one a layer \(4\), got 2: \[8, 16\]"):
        MoEConfig.from_hf_config(QWEN3 | {"num_experts": [8, 16]})


def test_without_a_number_of_layers_a_list_says_how_many_there_are() -> None:
    config = {key: value for key, value in QWEN3.items() if key != "num_hidden_layers"} | {"num_experts": [8, 16]}
    assert MoEConfig.from_hf_config(config, layer=1).num_experts == 16
    with pytest.raises(ValueError, match="num_experts is 8 in layer 0, 16 in layer 1"):
        MoEConfig.from_hf_config(config)


def test_keys_that_have_no_part_in_the_experts_may_differ() -> None:
    config = QWEN3 | {"per_layer_config": {"1": {"sliding_window": 8}, "2": {"intermediate_size": 8}}}
    assert MoEConfig.from_hf_config(config) == MoEConfig.from_hf_config(QWEN3)


def test_layers_without_experts_are_not_compared() -> None:
    config = DEEPSEEK | {"first_k_dense_replace": 1, "per_layer_config": {"0": {"n_routed_experts": 4}}}
    assert MoEConfig.from_hf_config(config).num_experts == 16
    skipped = DEEPSEEK | {"per_layer_config": {"3": {"n_routed_experts": 4, "skip": ["mlp"]}}}
    assert MoEConfig.from_hf_config(skipped).num_experts == 16
    dense = QWEN3 | {"per_layer_config": {"1": {"mlp_only_layers": [1], "num_experts": 4}}}
    assert MoEConfig.from_hf_config(dense).num_experts == 8


def test_a_layer_without_attention_is_compared() -> None:
    config = DEEPSEEK | {"per_layer_config": {"3": {"n_routed_experts": 4, "skip": ["self_attn"]}}}
    assert MoEConfig.from_hf_config(config, layer=3).num_experts == 4
    with pytest.raises(ValueError, match="num_experts is 16 in layers 0 to 2, 4 in layer 3"):
        MoEConfig.from_hf_config(config)


def test_overrides_of_all_layers_need_no_value_of_the_model() -> None:
    own = {str(layer): {"n_routed_experts": 4} for layer in range(4)}
    config = {key: value for key, value in DEEPSEEK.items() if key != "n_routed_experts"} | {"per_layer_config": own}
    assert MoEConfig.from_hf_config(config).num_experts == 4


@pytest.mark.parametrize(
    ("keys", "layer", "reason"),
    [
        ({"first_k_dense_replace": 3}, 2, "first_k_dense_replace=3"),
        ({"num_dense_layers": 1}, 0, "num_dense_layers=1"),
        ({"mlp_only_layers": [0, 2]}, 2, r"mlp_only_layers=\[0, 2\]"),
        ({"mlp_layer_types": ["dense", "sparse"]}, 0, r"mlp_layer_types\[0\]='dense'"),
        ({"decoder_sparse_step": 2}, 2, "decoder_sparse_step=2"),
        ({"moe_layer_freq": 3}, 1, "moe_layer_freq=3"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, 0, r"moe_layer_freq\[0\]=0"),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, 2, "expert_layer_period=2"),
        ({"layers_block_type": ["attention", "moe", "mlp", "moe"]}, 2, r"layers_block_type\[2\]='mlp'"),
        ({"moe_layers": [1, 3]}, 2, r"moe_layers=\[1, 3\]"),
        ({"interleave_moe_layer_step": 2}, 2, "interleave_moe_layer_step=2"),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, 1, r"skip of layer 1=\['mlp'\]"),
        ({"per_layer_config": {"1": {"mlp_only_layers": [1]}}}, 1, r"mlp_only_layers=\[1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_without_experts_is_refused_by_the_key_that_says_so(keys, layer, reason) -> None:
    with pytest.raises(ValueError, match=f"layer: expected one with experts, got {layer}, which has none by {reason}"):
        MoEConfig.from_hf_config(QWEN3 | keys, layer=layer)
    assert MoEConfig.from_hf_config(QWEN3 | keys, layer=3) == MoEConfig.from_hf_config(QWEN3)


@pytest.mark.parametrize("layer", [-1, 4], ids=repr)
def test_a_layer_that_the_model_has_not_is_refused(layer) -> None:
    with pytest.raises(ValueError, match=f"layer: expected 0 to 3, got {layer}"):
        MoEConfig.from_hf_config(QWEN3, layer=layer)


@pytest.mark.parametrize("layer", [True, "1", 1.0], ids=repr)
def test_what_numbers_no_layer_is_a_type_error(layer) -> None:
    with pytest.raises(TypeError, match=f"layer: expected an int, got {type(layer).__name__}"):
        MoEConfig.from_hf_config(QWEN3, layer=layer)


@pytest.mark.parametrize("overrides", [["1"], {"first": {}}, {"first": {"num_experts": 4}}, "1", {"1": 4}], ids=repr)
def test_overrides_that_are_no_mapping_of_layers_are_refused(overrides) -> None:
    if overrides == {"first": {}}:  # nothing is overridden
        assert MoEConfig.from_hf_config(QWEN3 | {"per_layer_config": overrides}).num_experts == 8
        return
    with pytest.raises(ValueError, match="per_layer_config: expected a mapping of layer numbers to keys"):
        MoEConfig.from_hf_config(QWEN3 | {"per_layer_config": overrides})


def test_step_clamps_in_some_layers_only() -> None:
    plain, clamped = (MoEConfig.from_hf_config(STEP, layer=layer) for layer in (1, 2))
    assert (plain.routing.routed_scaling_factor, plain.gemm1.activation_name, plain.swiglu) == (3.0, "Swiglu", None)
    assert (clamped.gemm1.activation_name, clamped.swiglu) == ("SwigluStep", SwigluNumbers(clamp_limit=7.0))
    with pytest.raises(ValueError, match=r"its layers differ: .*activation is 'Swiglu' in layers 0 to 1 and 3"):
        MoEConfig.from_hf_config(STEP)


def test_a_config_of_transformers_that_differs_by_layer() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    config = transformers.CONFIG_MAPPING["qwen3_moe"](**QWEN3, per_layer_config={1: {"moe_intermediate_size": 24}})
    assert MoEConfig.from_hf_config(config, layer=1).intermediate_size == 24
    assert MoEConfig.from_hf_config(config, layer=3).intermediate_size == 40
    with pytest.raises(ValueError, match="its layers differ: intermediate_size"):
        MoEConfig.from_hf_config(config)
