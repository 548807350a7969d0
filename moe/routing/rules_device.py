"""Device functions: what each routing method makes of a logit. The kernels are built from one `Rule` each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.checks import no_case
from moe.routing.config import RoutingConfig, RoutingMethod
from moe.routing.keys_device import key_of_logit, key_of_score, score_of_key
from moe.runtime.numba_warp_device import WARP_SIZE, build_sum_of_first, device_function, warp_first, warp_max

_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_EPSILON = np.float32(1e-20)
_MINUS_INFINITY = np.float32(-np.inf)

_sum_of_lanes = build_sum_of_first(WARP_SIZE)


@dataclass(frozen=True)
class Rule:
    """Four device functions. float32 throughout."""

    score: Any  # (logit, bias) -> score
    normalize: Any  # (scores): in place, over all slots of all lanes
    key: Any  # (score) -> its place in the total order
    weight: Any  # (value, is_chosen) -> weight; lane k has choice k, is_chosen is False in lanes without one
    weighs_logit: bool = False  # the value is the logit, not the score


def rule_of(config: RoutingConfig) -> Rule:
    """The rule of a config's method."""
    match config.method:
        case RoutingMethod.DEFAULT:
            return Rule(_logit_itself, _softmax_over_all, key_of_score, _itself)
        case RoutingMethod.RENORMALIZE | RoutingMethod.RENORMALIZE_NAIVE:
            return Rule(_logit_itself, _leave, key_of_logit, _softmax_over_chosen(config.top_k))
        case RoutingMethod.TOPK:
            return Rule(_logit_itself, _leave, key_of_logit, _itself)
        case RoutingMethod.LLAMA4 | RoutingMethod.TOPK_SIGMOID:
            return Rule(_logit_itself, _leave, key_of_logit, _sigmoid_of_value)
        case RoutingMethod.SIGMOID_RENORM if config.norm_topk_prob:
            return Rule(_sigmoid_alone, _leave, key_of_score, _share_of_chosen(config.top_k))
        case RoutingMethod.SIGMOID_RENORM | RoutingMethod.SIGMOID:
            return Rule(_sigmoid_alone, _leave, key_of_score, _itself)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            weight = _scaled_share_of_sigmoids(config.top_k, config.routed_scaling_factor)
            return Rule(_biased_sigmoid, _leave, key_of_score, weight, weighs_logit=True)
    raise no_case(config.method, "moe/routing/rules_device.py, rule_of")


@device_function
def sigmoid(x: np.float32) -> np.float32:
    return np.float32(_HALF * np.float32(math.tanh(_HALF * x)) + _HALF)


@device_function
def _logit_itself(logit: np.float32, bias: np.float32) -> np.float32:
    return logit


@device_function
def _sigmoid_alone(logit: np.float32, bias: np.float32) -> np.float32:
    return sigmoid(logit)


@device_function
def _biased_sigmoid(logit: np.float32, bias: np.float32) -> np.float32:
    return sigmoid(logit) + bias


@device_function
def _leave(scores: Any) -> None:
    pass


@device_function
def _softmax_over_all(scores: Any) -> None:
    """In place. Slots without an expert hold -inf."""
    lane_max = _MINUS_INFINITY
    for slot in range(len(scores)):
        if scores[slot] > lane_max:
            lane_max = scores[slot]
    largest = score_of_key(warp_max(key_of_score(lane_max)))
    lane_sum = _ZERO
    for slot in range(len(scores)):
        scores[slot] = np.float32(math.exp(scores[slot] - largest))
        lane_sum += scores[slot]
    total = _sum_of_lanes(lane_sum)
    for slot in range(len(scores)):
        scores[slot] = scores[slot] / total


@device_function
def _itself(value: np.float32, is_chosen: bool) -> np.float32:
    return value


@device_function
def _sigmoid_of_value(logit: np.float32, is_chosen: bool) -> np.float32:
    return sigmoid(logit)


def _softmax_over_chosen(top_k: int) -> Any:
    sum_of_chosen = build_sum_of_first(top_k)

    @device_function
    def softmax_over_chosen(logit: np.float32, is_chosen: bool) -> np.float32:
        largest = warp_first(logit)  # choices are in descending order
        term = np.float32(math.exp(logit - largest)) if is_chosen else _ZERO
        return term / sum_of_chosen(term)

    return softmax_over_chosen


def _share_of_chosen(top_k: int) -> Any:
    sum_of_chosen = build_sum_of_first(top_k)

    @device_function
    def share_of_chosen(score: np.float32, is_chosen: bool) -> np.float32:
        term = score if is_chosen else _ZERO
        total = sum_of_chosen(term)
        return term / (_EPSILON if total < _EPSILON else total)  # a NaN total stays

    return share_of_chosen


def _scaled_share_of_sigmoids(top_k: int, routed_scaling_factor: float) -> Any:
    scale = np.float32(routed_scaling_factor)
    sum_of_chosen = build_sum_of_first(top_k)

    @device_function
    def scaled_share_of_sigmoids(logit: np.float32, is_chosen: bool) -> np.float32:
        term = sigmoid(logit) if is_chosen else _ZERO
        return term * scale / (sum_of_chosen(term) + _EPSILON)

    return scaled_share_of_sigmoids
