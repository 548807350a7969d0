"""Keys that state a rule: each is read, or refused by name where the layer computes something else."""

from __future__ import annotations

import pytest

from moe.config import MoEConfig
from moe.gemm.config import SwigluNumbers
from moe.hf_config import FAMILIES

BASE = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
KEYS_OF_RULE = {
    "_deepseek_v3": {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "_axk2": {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "_deepseek_v2": {"topk_method": "greedy", "routed_scaling_factor": 1.0},
    "_mistral4": {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
    "_mistral_large4": {"routed_scaling_factor": 1.0},
    "_scaled_minimax_m2": {"routed_scaling_factor": 1.0},
    "_clamped_deepseek_v3": {
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "swiglu_limit": 10.0,
    },
    "_minimax_m3": {"routed_scaling_factor": 1.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "_step3": {"routed_scaling_factor": 1.0},
    "_gpt_oss": {"swiglu_limit": 7.0},
    "_inkling2": {"routed_scaling_factor": 1.0, "mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0},
    "_cohere2_moe": {"expert_selection_fn": "softmax"},
    "_flint": {"norm_topk_prob": True},
    "_softmax_normalised_if_asked": {"norm_topk_prob": True},
}
OTHER_VALUES = {
    "norm_topk_prob": [True, False],
    "moe_renormalize": [True, False],
    "route_norm": [True, False],
    "scoring_func": ["sigmoid", "softmax", "sqrtsoftplus"],
    "score_func": ["sigmoid", "softmax"],
    "score_function": ["sigmoid", "softmax"],
    "moe_router_activation_func": ["sigmoid", "softmax"],
    "moe_router_use_sigmoid": [True, False],
    "topk_method": ["greedy", "noaux_tc", "group_limited_greedy"],
    "n_group": [8],
    "num_expert_group": [8],
    "topk_group": [4],
    "routed_scaling_factor": [2.5, "2.5", True, -1.0, 0, float("inf")],
    "router_scaling_factor": [2.5, "2.5", True, -1.0],
    "moe_routed_scaling_factor": [2.5, True],
    "moe_router_scaling_factor": [2.5, True],
    "route_scale": [2.5, True],
    "swiglu_limit": [7.0],
    "swiglu_limits": [7.0],
    "mlp_gate_softcap": [3.0],
    "mlp_up_softcap": [3.0],
    "moe_router_logit_softcapping": [30.0],
    "moe_apply_router_weight_on_input": [True],
    "zero_expert_num": [4],
    "router_bias": [True],
}


def config_of(family: str) -> dict[str, object]:
    config = BASE | {"model_type": family} | KEYS_OF_RULE.get(FAMILIES[family].routing.__name__, {})
    return config | {"mlp_hidden_act": "relu2"} if family == "nemotron_h" else config


def score_of(layer: MoEConfig) -> str:
    return "softmax" if layer.routing.method.value in ("Default", "Renormalize") else "sigmoid"


def normalises(layer: MoEConfig) -> bool:
    return layer.routing.method.value in ("Renormalize", "DeepSeekV3", "MiniMax2", "SigmoidRenorm")


def says_the_same(layer: MoEConfig, family: str, key: str, value: object) -> bool:
    """Whether what a key states is what the layer computes."""
    routing = layer.routing
    if key in ("norm_topk_prob", "moe_renormalize", "route_norm"):
        return normalises(layer) is value
    if key == "moe_router_use_sigmoid":
        return (score_of(layer) == "sigmoid") is value
    if "scor" in key or "activation_func" in key:
        return score_of(layer) == value
    if key == "topk_method":
        return value == ("noaux_tc" if routing.method.uses_bias else "greedy")
    if key in ("n_group", "num_expert_group"):
        return (
            routing.n_group == value or FAMILIES[family].routing.__name__ == "_deepseek_v2"
        )  # whose greedy has no groups
    if key == "topk_group":
        return routing.topk_group == value or FAMILIES[family].routing.__name__ == "_deepseek_v2"
    if key in ("mlp_gate_softcap", "mlp_up_softcap"):
        numbers = layer.swiglu or SwigluNumbers()
        return (numbers.alpha if key == "mlp_gate_softcap" else numbers.beta) == value
    if key in ("swiglu_limit", "swiglu_limits"):
        return layer.swiglu is not None and layer.swiglu.clamp_limit == value
    if "scal" in key:
        return not isinstance(value, (bool, str)) and routing.routed_scaling_factor == value
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_states_a_rule_is_read_or_refused_by_name(family: str) -> None:
    MoEConfig.from_hf_config(config_of(family))
    for key, values in OTHER_VALUES.items():
        for value in values:
            layer, words = read(config_of(family) | {key: value})
            if layer is None:
                assert key in words or "always normalises" in words or "topk_group" in words
            else:
                assert says_the_same(layer, family, key, value), f"{key}={value!r} changed nothing"


def read(config: dict[str, object]) -> tuple[MoEConfig | None, str]:
    """The layer, or why it is refused."""
    try:
        return MoEConfig.from_hf_config(config), ""
    except ValueError as error:
        return None, str(error)


DEEPSEEK_V2 = config_of("deepseek_v2")
DOTS1 = config_of("dots1")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DEEPSEEK_V2 | {"norm_topk_prob": True}, "expected norm_topk_prob False, got True: Default routing never normalises"),
        (DEEPSEEK_V2 | {"scoring_func": "sigmoid"}, "expected scoring_func 'softmax', got 'sigmoid'"),
        (DOTS1 | {"scoring_func": "softmax"}, "expected scoring_func 'sigmoid', got 'softmax'"),
        (config_of("glm4_moe") | {"scoring_func": "noaux_tc"}, "expected scoring_func 'sigmoid', got 'noaux_tc'"),
        (DOTS1 | {"routed_scaling_factor": "2.5"}, "expected a number for routed_scaling_factor, got '2.5'"),
        (DOTS1 | {"routed_scaling_factor": True}, "expected a number for routed_scaling_factor, got True"),
        (DOTS1 | {"routed_scaling_factor": -1.0}, r"expected routed_scaling_factor above 0, got -1\.0"),
        (DOTS1 | {"routed_scaling_factor": float("nan")}, "expected routed_scaling_factor above 0, got nan"),
        (DOTS1 | {"routed_scaling_factor": 0}, "expected routed_scaling_factor above 0, got 0"),
        (config_of("laguna") | {"moe_router_logit_softcapping": 30.0}, "softcapping 0, got 30.0: capping logits is not"),
        (config_of("kimi_linear") | {"use_grouped_topk": False, "n_group": 4, "topk_group": 2}, "expected use_grouped_topk True"),
        (config_of("hunyuan_v1_moe") | {"moe_intermediate_size": 48}, "expected one value, got .*'moe_intermediate_size': 48"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_a_config_states_and_the_layer_does_not_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_hf_config(config)


@pytest.mark.parametrize(
    "config",
    [
        DEEPSEEK_V2 | {"norm_topk_prob": False, "scoring_func": "softmax", "n_group": 1, "topk_group": 1},
        DOTS1 | {"scoring_func": "noaux_tc", "topk_method": "noaux_tc"},
        config_of("mixtral") | {"routed_scaling_factor": 1, "swiglu_limit": None, "n_group": False},
        config_of("kimi_linear") | {"moe_router_activation_func": "sigmoid", "use_grouped_topk": True},
        config_of("hy_v3") | {"route_norm": True, "moe_router_use_sigmoid": True},
        config_of("mimo_v2_flash") | {"routed_scaling_factor": None, "topk_method": "noaux_tc"},
    ],
    ids=lambda config: config["model_type"],
)
def test_what_released_configs_state_is_taken(config: dict[str, object]) -> None:
    assert MoEConfig.from_hf_config(config).num_experts == 16
