"""config.json of Hugging Face models -> MoEConfig: the table and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe.config import MoEConfig
from moe.gemm.config import FLASHINFER, ActivationType, WeightLayout
from moe.hf_config import FAMILIES, REFUSED
from moe.hf_config.families import RUN_BY_NOTHING
from moe.routing.config import RoutingMethod
from moe.shapes import NAMED_SHAPES

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
MINIMAX_M2 = MIXTRAL | {
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
    "scoring_func": "sigmoid",
}
AFMOE = QWEN3_30B | {"model_type": "afmoe", "route_scale": 2.5}
NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 1856,
    "n_group": 1,
    "n_routed_experts": 128,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    ("config", "shape_name"),
    [
        (QWEN3_30B, "qwen3-30b-a3b"),
        (DEEPSEEK_V3, "deepseek-v3"),
        (KIMI_K2, "kimi-k2"),
        (MIXTRAL, "mixtral-8x7b"),
        (MINIMAX_M2, "minimax-m2"),
        (NEMOTRON_3_NANO, "nemotron-3-nano-30b-a3b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_released_config_gives_the_named_shape(config: dict[str, Any], shape_name: str) -> None:
    layer, shape = MoEConfig.from_hf_config(json.loads(json.dumps(config))), NAMED_SHAPES[shape_name]
    assert (layer.hidden_size, layer.intermediate_size) == (shape.hidden_size, shape.intermediate_size)
    assert (layer.num_experts, layer.top_k) == (shape.num_experts, shape.top_k)
    assert layer.routing.method.value == shape.method
    assert (layer.routing.n_group, layer.routing.topk_group) == (shape.n_group, shape.topk_group)
    assert layer.routing.routed_scaling_factor == shape.routed_scaling_factor
    assert layer.gemm1.is_gated == shape.is_gated
    assert layer.gemm1.weight_format.gate_up_order == "gate_up"
    assert layer.gemm1.weight_format.layout is WeightLayout.MajorK


def test_every_named_shape_is_a_valid_layer() -> None:
    for name, shape in NAMED_SHAPES.items():
        assert name == shape.name == name.lower()
        layer = MoEConfig.create(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            method=shape.method,
            n_group=shape.n_group,
            topk_group=shape.topk_group,
            routed_scaling_factor=shape.routed_scaling_factor,
            activation=shape.activation,
            num_local_experts=shape.num_local_experts,
        )
        assert layer.gemm1.weight_rows == shape.intermediate_size * (2 if shape.is_gated else 1)


def test_slice_weight_format_and_batch_invariance_are_the_callers() -> None:
    layer = MoEConfig.from_hf_config(
        QWEN3_30B, weight_format=FLASHINFER, local_expert_offset=32, num_local_experts=16, tile_rows=64
    )
    assert (layer.permute.local_expert_offset, layer.permute.num_local_experts) == (32, 16)
    assert layer.gemm1.weight_shape == (16, 32, 1536, 64)
    assert (layer.permute.tile_rows, layer.few_tokens.max_tokens) == (64, None)
    invariant = MoEConfig.from_hf_config(QWEN3_30B, is_batch_invariant=True)
    assert (invariant.permute.tile_rows, invariant.few_tokens.max_tokens) == (16, 0)


def test_the_text_part_of_a_multimodal_config_is_read() -> None:
    text = {key: value for key, value in QWEN3_30B.items() if key != "norm_topk_prob"}
    outer = {"model_type": "qwen3_vl_moe", "hidden_size": 1, "text_config": text | {"model_type": "qwen3_vl_moe_text"}}
    assert MoEConfig.from_hf_config(outer).hidden_size == 2048
    del outer["text_config"]["model_type"]
    assert MoEConfig.from_hf_config(outer).routing.method is RoutingMethod.RENORMALIZE


def test_norm_topk_prob_chooses_the_rule() -> None:
    assert MoEConfig.from_hf_config(QWEN3_30B).routing.method is RoutingMethod.RENORMALIZE
    assert MoEConfig.from_hf_config(QWEN3_30B | {"norm_topk_prob": False}).routing.method is RoutingMethod.DEFAULT


def test_null_groups_and_scale_mean_none() -> None:
    routing = MoEConfig.from_hf_config(
        DEEPSEEK_V3 | {"n_group": None, "topk_group": None, "routed_scaling_factor": None}
    ).routing
    assert (routing.n_group, routing.topk_group, routing.routed_scaling_factor) == (0, 0, 1.0)


def test_nemotron_with_a_latent_space_multiplies_in_it() -> None:
    layer = MoEConfig.from_hf_config(NEMOTRON_3_NANO | {"moe_latent_size": 1024})
    assert layer.hidden_size == 1024
    assert layer.gemm1.activation is ActivationType.Relu2


REQUIRED = {
    "qwen3_moe": (QWEN3_30B, {"intermediate_size", "model_type"}),
    "deepseek_v3": (DEEPSEEK_V3, {"intermediate_size", "model_type", "scoring_func", "topk_method"}),
    "nemotron_h": (NEMOTRON_3_NANO, {"model_type"}),
}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        pytest.param(config, key, id=f"{model_type}-{key}")
        for model_type, (config, unused) in REQUIRED.items()
        for key in config
        if key not in unused
    ],
)
def test_a_missing_key_is_named_and_never_guessed(config: dict[str, Any], key: str) -> None:
    incomplete = {name: value for name, value in config.items() if name != key}
    wanted = "hidden_act" if key == "mlp_hidden_act" else key
    with pytest.raises(
        ValueError, match=rf"config of model_type '{config['model_type']}': expected the key .*'{wanted}'"
    ):
        MoEConfig.from_hf_config(incomplete)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert"},
            r"model_type: expected one of afmoe, .*, unlimited_ocr; got 'bert'; .*MoEConfig.create\(",
        ),
        ({}, r"model_type: expected one of .* got 'None'"),
        (QWEN3_30B | {"hidden_act": "gelu"}, "expected hidden_act 'silu', of gated experts; got 'gelu'"),
        (QWEN3_30B | {"hidden_act": "relu2"}, "got 'relu2'"),
        (
            NEMOTRON_3_NANO | {"mlp_hidden_act": "silu"},
            "expected mlp_hidden_act 'relu2', of experts without a gate; got 'silu'",
        ),
        (QWEN3_30B | {"num_experts": {"0": 8}}, r"expected one whole number for num_experts .*got \{'0': 8\}"),
        (QWEN3_30B | {"num_experts": True}, "expected one whole number"),
        (QWEN3_30B | {"norm_topk_prob": "yes"}, "expected true or false for norm_topk_prob, got 'yes'"),
        (
            QWEN3_30B | {"num_local_experts": 64},
            "expected one value, got .*'num_experts': 128, 'num_local_experts': 64",
        ),
        (DEEPSEEK_V3 | {"norm_topk_prob": False}, "always normalises"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "expected scoring_func 'sigmoid', got 'softmax'"),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "expected topk_method 'noaux_tc', got 'greedy'"),
        (MINIMAX_M2 | {"scoring_func": "softmax"}, "expected scoring_func 'sigmoid', got 'softmax'"),
        (AFMOE | {"score_func": "softmax"}, "expected score_func 'sigmoid', got 'softmax'"),
        (AFMOE | {"route_norm": False}, "expected route_norm True, got False"),
        (
            QWEN3_30B | {"model_type": "cohere2_moe", "expert_selection_fn": "tanh"},
            "'softmax' or 'sigmoid', got 'tanh'",
        ),
        (DEEPSEEK_V3 | {"num_experts_per_tok": 200}, "top_k must be less than total number of experts in selected"),
        (
            DEEPSEEK_V3 | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
            "expected topk_method 'greedy'",
        ),
        (DEEPSEEK_V3 | {"model_type": "deepseek_v2", "topk_method": "greedy"}, "expected routed_scaling_factor 1"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else value.get("model_type", "empty"),
)
def test_what_cannot_be_computed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_hf_config(config)


@pytest.mark.parametrize(("top_k", "method"), [(1, "Llama4"), (2, "TopKSigmoid")])
def test_llama4_weighs_the_input_of_its_experts(top_k: int, method: str) -> None:
    text = {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": top_k,
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
    }
    layer = MoEConfig.from_hf_config({"model_type": "llama4", "text_config": text})
    assert (layer.weight_on, layer.routing.method.value, layer.top_k) == ("input", method, top_k)
    assert (layer.hidden_size, layer.intermediate_size, layer.num_experts) == (5120, 8192, 16)
    assert layer.gemm1.weight_format.layout is WeightLayout.MajorMn
    assert MoEConfig.from_hf_config(text, layer=3) == layer
    assert MoEConfig.from_hf_config(text | {"moe_layers": [0]}, layer=0) == layer


def test_a_transformers_config_is_read_as_its_dict() -> None:
    class Config:
        def to_dict(self) -> dict[str, object]:
            return dict(QWEN3_30B)

    assert MoEConfig.from_hf_config(Config()) == MoEConfig.from_hf_config(QWEN3_30B)


@pytest.mark.parametrize("config", [None, "config.json", ["qwen3_moe"]], ids=["none", "path", "list"])
def test_something_else_than_a_mapping_is_a_type_error(config: object) -> None:
    with pytest.raises(TypeError, match=r"config: expected a mapping, got .*json\.load"):
        MoEConfig.from_hf_config(config)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_family_is_told_whether_use_moe_runs_it(family: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[family])) as error:
        MoEConfig.from_hf_config({"model_type": family})
    assert ("use_moe runs a whole model of it" in str(error.value)) == (family not in RUN_BY_NOTHING)


def test_no_family_is_both_known_and_refused() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()


def test_the_page_lists_the_families_that_are_known_and_those_that_are_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
    known, refused = (page.split(before)[1].split("\n\n")[1] for before in ("\nKnown, each ", "\nRefused, each "))
    assert re.split(r",\s+", known) == sorted(FAMILIES)
    assert re.split(r",\s+", refused) == sorted(REFUSED)
