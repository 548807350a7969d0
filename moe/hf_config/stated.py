"""Keys that state a rule: each that is there must say what the layer computes, whether or not the rule reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe.hf_config.keys import N_GROUP_KEYS, NORM_KEYS, SCALE_KEYS, TOPK_GROUP_KEYS, Keys

if TYPE_CHECKING:
    from moe.hf_config.families import Family

SCORE_KEYS = (
    "scoring_func",
    "score_func",
    "score_function",
    "moe_router_activation_func",
    "expert_selection_fn",
)
LIMIT_KEYS = ("swiglu_limit", "swiglu_limits")  # the second a list by layer; null and 0 mean none
SOFTCAP_KEYS = {"mlp_gate_softcap": "alpha", "mlp_up_softcap": "beta"}
OFF_KEYS = {
    "moe_router_logit_softcapping": "capping logits is not implemented",
    "moe_apply_router_weight_on_input": "the router's weight is multiplied into the output",
    "zero_expert_num": "experts that return their input are not implemented",
    "router_bias": "the router's bias is part of the logits that the layer is given: add it there",
} | dict.fromkeys(
    LIMIT_KEYS, "the experts clamp gate and up: pass swiglu=SwigluNumbers(clamp_limit=...) to a layer built by hand"
)

# method -> what an expert's score is, and whether weights are divided by their sum
_SCORES = {
    "Default": ("softmax", False),
    "Renormalize": ("softmax", True),
    "DeepSeekV3": ("sigmoid", True),
    "MiniMax2": ("sigmoid", True),
    "SigmoidRenorm": ("sigmoid", True),
    "Sigmoid": ("sigmoid", False),
    "TopKSigmoid": ("sigmoid", False),
    "Llama4": ("sigmoid", False),
}
_WITH_BIAS = ("DeepSeekV3", "MiniMax2")


def expect_nothing_else(keys: Keys, fields: Mapping[str, Any], family: Family) -> None:
    """Raise where a key states another rule than `fields`, which a family's rule may not have looked at.

    Raises:
        ValueError: naming the key, what this layer computes, and what came.
    """
    method = fields["method"]
    score, is_normalised = _SCORES[method]
    choice = "noaux_tc" if method in _WITH_BIAS else "greedy"
    is_grouped = fields.get("n_group", 0) > 1
    _expect(keys, NORM_KEYS, (is_normalised,), f"{method} routing {'always' if is_normalised else 'never'} normalises")
    _expect(keys, SCORE_KEYS, (score, *family.score_names), f"{method} routing scores by {score}")
    _expect(keys, ("moe_router_use_sigmoid",), (score == "sigmoid",), f"{method} routing scores by {score}")
    _expect(keys, ("topk_method",), (choice,), f"{method} routing is {choice!r}")
    _expect(
        keys,
        SCALE_KEYS,
        (fields.get("routed_scaling_factor", 1.0),),
        f"{method} routing with a scale is not implemented",
    )
    if keys.config.get("topk_method") != "greedy":  # which says that groups have no part
        reason = f"{method} routing within the best groups is not implemented"
        _expect(keys, N_GROUP_KEYS, (fields.get("n_group", 0), 0, 1), reason)
        _expect(keys, TOPK_GROUP_KEYS, (fields.get("topk_group", 0), *((0, 1) if not is_grouped else ())), reason)
    if is_grouped:
        _expect(keys, ("use_grouped_topk",), (True,), "the groups that it names are used")
    numbers = fields.get("swiglu", {})
    limit = numbers.get("clamp_limit", 0)
    for name, number in SOFTCAP_KEYS.items():
        allowed = numbers.get(number, 0) if fields.get("activation") == "Situ" else 0
        _expect(keys, (name,), (allowed,), f"{method} experts of another family cap neither gate nor up")
    for name, reason in OFF_KEYS.items():
        _expect(keys, (name,), (limit if name in LIMIT_KEYS else 0,), reason)


def _expect(keys: Keys, names: tuple[str, ...], allowed: tuple[Any, ...], reason: str) -> None:
    """Raise unless each of these keys that is there has an allowed value. false is no number, but none of anything."""
    for name, value in keys.given(names).items():
        is_none = value is False and not any(isinstance(one, bool) for one in allowed)
        if not is_none and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            raise keys.refusal(f"expected {name} {allowed[0]!r}, got {value!r}: {reason}")
