"""A Hugging Face config.json, as a plain mapping, -> the arguments of `MoEConfig.create`. Needs no transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
BY_HAND = (
    "build it by hand: MoEConfig.create(hidden_size=..., intermediate_size=..., num_experts=..., top_k=..., method=...)"
)


def layer_fields(config: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Arguments of `MoEConfig.create` for the MoE layers of the model that `config` describes.

    Args:
        config: the content of config.json, or a transformers config. Where it has a `text_config`, that is read.

    Returns:
        hidden_size, intermediate_size (of one expert), num_experts, top_k, the routing rule, the activation, and the
        weight format in which transformers holds the experts. All come from `config`: defaults of transformers' classes
        are never used, since released checkpoints differ from them.

    Raises:
        TypeError: not a mapping.
        ValueError: an unknown model_type, a key that is missing, or a layer that this package does not compute.
    """
    if not isinstance(config, Mapping) and callable(to_dict := getattr(config, "to_dict", None)):
        config = to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a mapping, got {type(config).__name__}; "
            "pass json.load(...) of config.json, or the model's config"
        )
    outer_type = config.get("model_type")
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    model_type = str(config.get("model_type") or outer_type)
    family_name = model_type.removesuffix("_text")
    if family_name in REFUSED:
        raise ValueError(f"model_type {model_type!r}: {REFUSED[family_name]}")
    if family_name not in FAMILIES:
        raise ValueError(
            f"model_type: expected one of {', '.join(sorted(FAMILIES))}; got {model_type!r}; "
            f"for another model {BY_HAND}"
        )
    family = FAMILIES[family_name]
    keys = _Keys(model_type, config)
    fields = {
        "hidden_size": keys.hidden_size(),
        "intermediate_size": keys.count(family.intermediate_size),
        "num_experts": keys.count(*NUM_EXPERTS_KEYS),
        "top_k": keys.count(*TOP_K_KEYS),
        "activation": keys.activation(),
        "weight_format": {"layout": family.weight_layout},
    }
    return fields | family.routing(keys)


@dataclass(frozen=True)
class _Keys:
    """Typed access to a config's keys. An absent key and a null are both missing."""

    model_type: str
    config: Mapping[str, Any]

    def hidden_size(self) -> int:
        # Nemotron-H may project tokens to a narrower space before its experts and back after them.
        return self.count("moe_latent_size") if self.config.get("moe_latent_size") else self.count("hidden_size")

    def activation(self) -> str:
        key = "mlp_hidden_act" if "mlp_hidden_act" in self.config else "hidden_act"
        name = self.value(key)
        is_gated = self.model_type != "nemotron_h"
        if is_gated and name in ("silu", "swish"):
            return "Swiglu"
        if not is_gated and name == "relu2":
            return "Relu2"
        wanted = "'silu', of gated experts" if is_gated else "'relu2', of experts without a gate"
        raise self.refusal(f"expected {key} {wanted}; got {name!r}")

    def value(self, *names: str) -> Any:
        """The value under the one of these names that is there."""
        found = {name: self.config[name] for name in names if self.config.get(name) is not None}
        if not found:
            wanted = " or ".join(map(repr, names))
            raise ValueError(f"config of model_type {self.model_type!r}: expected the key {wanted}, got none; add it")
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"config of model_type {self.model_type!r}: expected one value, got {found}; keep one key")
        return values[0]

    def count(self, *names: str) -> int:
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(f"expected one whole number for {' or '.join(names)}, got {value!r}")
        return value

    def flag(self, *names: str) -> bool:
        value = self.value(*names)
        if not isinstance(value, bool):
            raise self.refusal(f"expected true or false for {' or '.join(names)}, got {value!r}")
        return value

    def group_count(self, *names: str) -> int:
        """0 for a null; a key that is absent is an error."""
        if any(name in self.config and self.config[name] is None for name in names):
            return 0
        return self.count(*names)

    def scale(self, *names: str) -> float:
        """1 for a null; a key that is absent is an error."""
        if any(name in self.config and self.config[name] is None for name in names):
            return 1.0
        return float(self.value(*names))

    def expect(self, name: str, wanted: Any, reason: str) -> None:
        """Refuse a key that is there with another value."""
        if self.config.get(name, wanted) != wanted:
            raise self.refusal(f"expected {name} {wanted!r}, got {self.config[name]!r}: {reason}")

    def refusal(self, what: str) -> ValueError:
        return ValueError(f"config of model_type {self.model_type!r}: {what}; {BY_HAND}")


def _softmax_normalised_if_asked(keys: _Keys) -> dict[str, Any]:
    return {"method": "Renormalize" if keys.flag("norm_topk_prob") else "Default"}


def _softmax_normalised(keys: _Keys) -> dict[str, Any]:
    return {"method": "Renormalize"}


def _softmax(keys: _Keys) -> dict[str, Any]:
    return {"method": "Default"}


def _deepseek_v2(keys: _Keys) -> dict[str, Any]:
    if keys.value("topk_method") != "greedy":
        raise keys.refusal("softmax routing within the best groups is not implemented; expected topk_method 'greedy'")
    if keys.scale("routed_scaling_factor") != 1:
        raise keys.refusal("softmax routing with a scale is not implemented; expected routed_scaling_factor 1")
    return {"method": "Default"}


def _deepseek_v3(keys: _Keys) -> dict[str, Any]:
    keys.expect("scoring_func", "sigmoid", "DeepSeekV3 routing scores by sigmoid")
    keys.expect("topk_method", "noaux_tc", "DeepSeekV3 routing ranks groups by their two best experts")
    if not keys.flag("norm_topk_prob", "moe_renormalize"):
        raise keys.refusal("DeepSeekV3 routing always normalises; expected norm_topk_prob true, got false")
    return {
        "method": "DeepSeekV3",
        "n_group": keys.group_count("n_group", "num_expert_group"),
        "topk_group": keys.group_count("topk_group"),
        "routed_scaling_factor": keys.scale("routed_scaling_factor"),
    }


def _minimax_m2(keys: _Keys) -> dict[str, Any]:
    keys.expect("scoring_func", "sigmoid", "MiniMax2 routing scores by sigmoid")
    return {"method": "MiniMax2"}


def _hy_v3(keys: _Keys) -> dict[str, Any]:
    return {"method": "MiniMax2", "routed_scaling_factor": keys.scale("router_scaling_factor")}


def _afmoe(keys: _Keys) -> dict[str, Any]:
    keys.expect("score_func", "sigmoid", "MiniMax2 routing scores by sigmoid")
    keys.expect("route_norm", True, "MiniMax2 routing always normalises")
    return {"method": "MiniMax2", "routed_scaling_factor": keys.scale("route_scale")}


def _flint(keys: _Keys) -> dict[str, Any]:
    return {"method": "SigmoidRenorm" if keys.flag("norm_topk_prob") else "Sigmoid"}


def _cohere2_moe(keys: _Keys) -> dict[str, Any]:
    score = keys.value("expert_selection_fn")
    if score == "softmax":
        return {"method": "Renormalize"}
    if score == "sigmoid":
        return {"method": "SigmoidRenorm" if keys.flag("norm_topk_prob") else "TopKSigmoid"}
    raise keys.refusal(f"expected expert_selection_fn 'softmax' or 'sigmoid', got {score!r}")


@dataclass(frozen=True)
class _Family:
    """How the models of one model_type name and route their experts, as transformers' modeling file has it."""

    routing: Callable[[_Keys], dict[str, Any]]
    intermediate_size: str = "moe_intermediate_size"  # the key of I
    weight_layout: str = "MajorK"


FAMILIES = {
    "afmoe": _Family(_afmoe),
    "aria": _Family(_softmax_normalised, "intermediate_size", weight_layout="MajorMn"),
    "axk1": _Family(_deepseek_v3),
    "cohere2_moe": _Family(_cohere2_moe, "intermediate_size"),
    "deepseek_v2": _Family(_deepseek_v2),
    "deepseek_v3": _Family(_deepseek_v3),
    "deepseek_v32": _Family(_deepseek_v3),
    "dots1": _Family(_deepseek_v3),
    "exaone_moe": _Family(_deepseek_v3),
    "flex_olmo": _Family(_softmax_normalised_if_asked, "intermediate_size"),
    "flint": _Family(_flint),
    "glm4_moe": _Family(_deepseek_v3),
    "glm4_moe_lite": _Family(_deepseek_v3),
    "glm4v_moe": _Family(_deepseek_v3),
    "glm_moe_dsa": _Family(_deepseek_v3),
    "granitemoe": _Family(_softmax_normalised, "intermediate_size"),
    "granitemoehybrid": _Family(_softmax_normalised, "intermediate_size"),
    "granitemoeshared": _Family(_softmax_normalised, "intermediate_size"),
    "hy_v3": _Family(_hy_v3),
    "jamba": _Family(_softmax, "intermediate_size"),
    "kimi_k2": _Family(_deepseek_v3),  # the checkpoint names DeepseekV3ForCausalLM as its architecture
    "kimi_linear": _Family(_deepseek_v3),
    "mellum": _Family(_softmax_normalised_if_asked),
    "mimo_v2_flash": _Family(_deepseek_v3),
    "minimax": _Family(_softmax_normalised, "intermediate_size"),
    "minimax_m2": _Family(_minimax_m2, "intermediate_size"),
    "mixtral": _Family(_softmax_normalised, "intermediate_size"),
    "nemotron_h": _Family(_deepseek_v3),
    "olmoe": _Family(_softmax_normalised_if_asked, "intermediate_size"),
    "qwen2_moe": _Family(_softmax_normalised_if_asked),
    "qwen3_5_moe": _Family(_softmax_normalised),
    "qwen3_moe": _Family(_softmax_normalised_if_asked),
    "qwen3_next": _Family(_softmax_normalised_if_asked),
    "qwen3_vl_moe": _Family(_softmax_normalised),
    "solar_open": _Family(_deepseek_v3),
}

REFUSED = {
    "ernie4_5_moe": "it chooses experts by softmax plus a bias, a rule that is not implemented",
    "gpt_oss": "its experts have biases and interleaved, clamped gates, which are not implemented",
    "lfm2_moe": "it normalises sigmoid scores with an epsilon of 1e-6, which is not implemented (MiniMax2 has 1e-20)",
    "llama4": (
        "it multiplies the router's weight into each expert's input, and this layer multiplies it into the output, "
        "which is another function; to use that all the same, "
        + BY_HAND.removesuffix("method=...)")
        + "method='Llama4')"
    ),
}
