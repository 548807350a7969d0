"""How each family of models names and routes its experts, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe.hf_config.keys import N_GROUP_KEYS, NORM_KEYS, SCALE_KEYS, TOP_K_KEYS, TOPK_GROUP_KEYS, Keys


def _softmax_normalised_if_asked(keys: Keys) -> dict[str, Any]:
    return {"method": "Renormalize" if keys.flag("norm_topk_prob") else "Default"}


def _softmax_normalised(keys: Keys) -> dict[str, Any]:
    return {"method": "Renormalize"}


def _softmax(keys: Keys) -> dict[str, Any]:
    return {"method": "Default"}


def _deepseek_v2(keys: Keys) -> dict[str, Any]:
    if keys.value("topk_method") != "greedy":
        raise keys.refusal("softmax routing within the best groups is not implemented; expected topk_method 'greedy'")
    _expect_no_scale(keys)
    return {"method": "Default"}


def _mistral4(keys: Keys) -> dict[str, Any]:
    _expect_no_scale(keys)
    return _softmax_normalised_if_asked(keys)


def _mistral_large4(keys: Keys) -> dict[str, Any]:
    _expect_no_scale(keys)
    return _softmax_normalised(keys)


def _expect_no_scale(keys: Keys) -> None:
    if keys.scale("routed_scaling_factor") != 1:
        raise keys.refusal("softmax routing with a scale is not implemented; expected routed_scaling_factor 1")


def _deepseek_v3(keys: Keys) -> dict[str, Any]:
    if not keys.flag(*NORM_KEYS):
        raise keys.refusal("DeepSeekV3 routing always normalises; expected norm_topk_prob true, got false")
    return {
        "method": "DeepSeekV3",
        "n_group": keys.group_count(*N_GROUP_KEYS),
        "topk_group": keys.group_count(*TOPK_GROUP_KEYS),
        "routed_scaling_factor": keys.scale("routed_scaling_factor"),
    }


def _axk2(keys: Keys) -> dict[str, Any]:
    fields = _deepseek_v3(keys)
    if fields["n_group"] > 1:
        raise keys.refusal(
            f"expected n_group 1, got {fields['n_group']}: it gives experts of other groups the key 0, so that they are "
            "chosen before those whose score and bias are below 0, and DeepSeekV3 routing never chooses them"
        )
    return fields


def _clamped_deepseek_v3(keys: Keys) -> dict[str, Any]:
    return _deepseek_v3(keys) | {"swiglu": {"clamp_limit": keys.positive("swiglu_limit")}}


def _minimax_m3(keys: Keys) -> dict[str, Any]:
    numbers = {"alpha": keys.positive("swiglu_alpha"), "beta": 1.0, "clamp_limit": keys.positive("swiglu_limit")}
    return _scaled_minimax_m2(keys) | {"swiglu": numbers}


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    # Released configs are older than the key of alpha, which was a number of the code.
    alpha = keys.positive("swiglu_alpha") if keys.given(["swiglu_alpha"]) else 1.702
    return {
        "method": "Renormalize",
        "swiglu": {"alpha": alpha, "beta": 1.0, "clamp_limit": keys.positive("swiglu_limit")},
        "has_biases": True,
        "weight_format": {"layout": "MajorMn", "gate_up_order": "interleaved"},
    }


def _inkling2(keys: Keys) -> dict[str, Any]:
    numbers = {"alpha": keys.positive("mlp_gate_softcap"), "beta": keys.positive("mlp_up_softcap")}
    return _scaled_minimax_m2(keys) | {"activation": "Situ", "swiglu": numbers}


def _step3(keys: Keys) -> dict[str, Any]:
    """A limit clamps silu(gate) and up; a layer without one, or with 0, clamps nothing."""
    fields = _scaled_minimax_m2(keys)
    if not keys.config.get("swiglu_limits"):
        return fields
    return fields | {"activation": "SwigluStep", "swiglu": {"clamp_limit": keys.positive("swiglu_limits")}}


def _minimax_m2(keys: Keys) -> dict[str, Any]:
    return {"method": "MiniMax2"}


def _scaled_minimax_m2(keys: Keys) -> dict[str, Any]:
    return {"method": "MiniMax2", "routed_scaling_factor": keys.scale(*SCALE_KEYS)}


def _flint(keys: Keys) -> dict[str, Any]:
    return {"method": "SigmoidRenorm" if keys.flag("norm_topk_prob") else "Sigmoid"}


def _cohere2_moe(keys: Keys) -> dict[str, Any]:
    score = keys.value("expert_selection_fn")
    if score == "softmax":
        return {"method": "Renormalize"}
    if score == "sigmoid":
        return {"method": "SigmoidRenorm" if keys.flag("norm_topk_prob") else "TopKSigmoid"}
    raise keys.refusal(f"expected expert_selection_fn 'softmax' or 'sigmoid', got {score!r}")


def _llama4(keys: Keys) -> dict[str, Any]:
    return {"method": "Llama4" if keys.count(*TOP_K_KEYS) == 1 else "TopKSigmoid", "weight_on": "input"}


@dataclass(frozen=True)
class Family:
    """How the models of one model_type name and route their experts, as transformers' modeling file has it."""

    routing: Callable[[Keys], dict[str, Any]]
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size",)  # the keys of I
    weight_layout: str = "MajorK"
    score_names: tuple[str, ...] = ()  # what else its configs call their score


_PLAIN_SIZE = ("intermediate_size",)

FAMILIES = {
    "afmoe": Family(_scaled_minimax_m2),
    "aria": Family(_softmax_normalised, _PLAIN_SIZE, weight_layout="MajorMn"),
    "axk1": Family(_deepseek_v3),
    "axk2": Family(_axk2),
    "bailing_hybrid": Family(_deepseek_v3),
    "beam": Family(_deepseek_v3),
    "cohere2_moe": Family(_cohere2_moe, _PLAIN_SIZE),
    "deepseek_ocr2": Family(_deepseek_v2),
    "deepseek_v2": Family(_deepseek_v2),
    "deepseek_v3": Family(_deepseek_v3),
    "deepseek_v32": Family(_deepseek_v3),
    "dots1": Family(_deepseek_v3, score_names=("noaux_tc",)),  # so in the released checkpoint, which scores by sigmoid
    "dots3_note": Family(_deepseek_v3),
    "exaone_moe": Family(_deepseek_v3),
    "flex_olmo": Family(_softmax_normalised_if_asked, _PLAIN_SIZE),
    "flint": Family(_flint),
    "glm4_moe": Family(_deepseek_v3),
    "glm4_moe_lite": Family(_deepseek_v3),
    "glm4v_moe": Family(_deepseek_v3),
    "glm5_next": Family(_clamped_deepseek_v3),
    "glm_moe_dsa": Family(_deepseek_v3),
    "gpt_oss": Family(_gpt_oss, _PLAIN_SIZE),
    "granitemoe": Family(_softmax_normalised, _PLAIN_SIZE),
    "granitemoe_swa": Family(_softmax_normalised, _PLAIN_SIZE),
    "granitemoehybrid": Family(_softmax_normalised, _PLAIN_SIZE),
    "granitemoeshared": Family(_softmax_normalised, _PLAIN_SIZE),
    # transformers reads the first of its two sizes, other engines the second: both must say the same.
    "hunyuan_v1_moe": Family(_softmax_normalised, ("intermediate_size", "moe_intermediate_size")),
    "hy_v3": Family(_scaled_minimax_m2),
    "hy_v4": Family(_clamped_deepseek_v3),
    "hy_v4_vl": Family(_clamped_deepseek_v3),
    "inkling2": Family(_inkling2),
    "inkling2_loop": Family(_inkling2),
    "jamba": Family(_softmax, _PLAIN_SIZE),
    "jetmoe": Family(_softmax_normalised, _PLAIN_SIZE),
    "kimi_k2": Family(_deepseek_v3),  # the checkpoint names DeepseekV3ForCausalLM as its architecture
    "kimi_k25": Family(_deepseek_v3),
    "kimi_linear": Family(_deepseek_v3),
    "laguna": Family(_scaled_minimax_m2),
    "lara_mini": Family(_softmax_normalised_if_asked),
    "llama4": Family(_llama4, _PLAIN_SIZE, weight_layout="MajorMn"),
    "mellum": Family(_softmax_normalised_if_asked),
    "mimo_v2_flash": Family(_deepseek_v3),
    "minimax": Family(_softmax_normalised, _PLAIN_SIZE),
    "minimax_m2": Family(_minimax_m2, _PLAIN_SIZE),
    "minimax_m3_vl": Family(_minimax_m3, _PLAIN_SIZE),
    "mistral4": Family(_mistral4),
    "mistral_large4": Family(_mistral_large4),
    "mixtral": Family(_softmax_normalised, _PLAIN_SIZE),
    "nemotron_h": Family(_deepseek_v3),
    "olmoe": Family(_softmax_normalised_if_asked, _PLAIN_SIZE),
    "qwen2_moe": Family(_softmax_normalised_if_asked),
    "qwen3_5_moe": Family(_softmax_normalised),
    "qwen3_moe": Family(_softmax_normalised_if_asked),
    "qwen3_next": Family(_softmax_normalised_if_asked),
    "qwen3_omni_moe": Family(_softmax_normalised_if_asked),
    "qwen3_omni_moe_talker": Family(_softmax_normalised_if_asked),
    "qwen3_omni_moe_thinker": Family(_softmax_normalised_if_asked),
    "qwen3_vl_moe": Family(_softmax_normalised),
    "qwen4_exp": Family(_softmax_normalised_if_asked),
    "sarvam_mla": Family(_deepseek_v3),
    "sarvam_moe": Family(_deepseek_v3),
    "solar_open": Family(_deepseek_v3),
    "step3p5": Family(_step3),
    "step3p7": Family(_step3),
    "unlimited_ocr": Family(_deepseek_v2),
}

_BIASED_SOFTMAX = "it chooses experts by softmax plus a bias, a rule that is not implemented"
_OWN_SCALES = "it multiplies each expert's weight by a number of the checkpoint, and its experts have a GELU, which are not implemented"

REFUSED = {
    "dbrx": "its experts keep gate, up and down in matrices of their own, a format that is not implemented",
    "deepseek_v4": "it scores by the root of a softplus, and its first layers choose experts by a table of tokens, "
    "which are not implemented",
    "diffusion_gemma": _OWN_SCALES,
    "doge": "its experts are single rows, chosen by products of keys, which is another function",
    "ernie4_5_moe": _BIASED_SOFTMAX,
    "ernie4_5_vl_moe": f"{_BIASED_SOFTMAX}, and it has one set of experts for text and one for images",
    "gemma4": _OWN_SCALES,
    "inkling": "it normalises the weights of routed and shared experts together, which is not implemented",
    "inkling_mm_model": "it normalises the weights of routed and shared experts together, which is not implemented",
    "kolibri1": "it adds its correction bias to the logit rather than to its sigmoid, a rule that is not implemented",
    "lfm2_moe": "it normalises sigmoid scores with an epsilon of 1e-6, which is not implemented (MiniMax2 has 1e-20)",
    "longcat_flash": f"{_BIASED_SOFTMAX}, and some of its experts return their input, which is not implemented",
    "muse_spark": "it normalises what each expert returns, which is not implemented",
    "nllb-moe": "its experts have biases and no gate, and take only so many tokens each, which is not implemented",
    "openai_privacy_filter": "its experts have biases, and its weights are divided by top_k, which is not implemented",
    "phimoe": "it chooses its two experts one after the other, each by a softmax of its own (sparsemixer), "
    "a rule that is not implemented",
    "switch_transformers": "its experts have no gate, and take only so many tokens each, which is not implemented",
    "vitpose_backbone": "its experts are chosen by the data set of an image and not by a router",
    "zaya": f"{_BIASED_SOFTMAX}, and a token may choose no expert",
}

# Of those, what use_moe does not run either: their experts are no modules that it can stand for.
RUN_BY_NOTHING = ("doge", "nllb-moe", "switch_transformers", "vitpose_backbone")
