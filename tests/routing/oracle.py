"""Routing token by token in Python's own floats: what the torch reference is held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe.routing.config import RoutingConfig, RoutingMethod

BF16_HALF_ULP = 2.0**-8  # relative, at most
FLOAT32_NOISE = 2.0**-16  # relative: cancellation in sums and in the sigmoid of logits down to -5


@dataclass(frozen=True)
class ExactTopK:
    expert_ids: list[list[int]]  # [T][K]
    weights: list[list[float]]  # [T][K]
    margin: float  # smallest difference of keys, or of scores of groups, that decided anything


def select_experts_exactly(logits: Tensor, bias: Tensor | None, config: RoutingConfig) -> ExactTopK:
    """logits [T, E] finite; bias [E] or None."""
    biases = [0.0] * config.num_experts
    if bias is not None and config.method.uses_bias:
        biases = (bias.bfloat16() if config.is_grouped else bias).double().tolist()
    margins = [math.inf]
    all_ids, all_weights = [], []
    for row in logits.double().tolist():
        keys = _keys(row, biases, config)
        candidates = list(range(config.num_experts))
        if config.is_grouped:
            candidates = _experts_of_best_groups(keys, config, margins)
        order = sorted(candidates, key=lambda expert: (-keys[expert], expert))
        margins.extend(_gaps([keys[expert] for expert in order[: config.top_k + 1]]))
        all_ids.append(order[: config.top_k])
        all_weights.append(_weights([row[expert] for expert in all_ids[-1]], row, config))
    return ExactTopK(all_ids, all_weights, min(margins))


def assert_weights_are_exact_but_for_one_rounding(weights: Tensor, exact: ExactTopK) -> None:
    assert weights.dtype is torch.bfloat16
    expected = torch.tensor(exact.weights, dtype=torch.float64).reshape(weights.shape)
    budget = expected.abs() * (BF16_HALF_ULP + FLOAT32_NOISE)
    excess = (weights.cpu().double() - expected).abs() - budget
    assert not excess.numel() or excess.max() <= 0, f"off by {excess.max():.3e} more than a rounding"


def separated_problem(
    config: RoutingConfig,
    num_tokens: int,
    *,
    logits_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, ExactTopK]:
    """Logits in [-4, 4] and a bias whose float32 errors cannot change a choice, with the exact result.

    Equal logits stay possible where bfloat16 has too few values; they give equal keys on every machine.
    """
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.linspace(-4, 4, config.num_experts)
        order = torch.rand(num_tokens, config.num_experts, generator=generator).argsort(dim=1)
        logits = steps[order].to(logits_dtype)
        bias = None
        if bias_dtype is not None:
            bias = torch.randn(config.num_experts, generator=generator).to(bias_dtype)
        exact = select_experts_exactly(logits, bias, config)
        if exact.margin > 1e-6:
            return logits, bias, exact
    raise AssertionError("no seed separates the keys; use fewer tokens or experts")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _softmax(values: list[float]) -> list[float]:
    terms = [math.exp(value - max(values)) for value in values]
    return [term / sum(terms) for term in terms]


def _keys(row: list[float], biases: list[float], config: RoutingConfig) -> list[float]:
    match config.method:
        case RoutingMethod.DEFAULT:
            return _softmax(row)
        case RoutingMethod.SIGMOID | RoutingMethod.SIGMOID_RENORM:
            return [_sigmoid(x) for x in row]
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            return [_sigmoid(x) + bias for x, bias in zip(row, biases)]
        case _:
            return row


def _experts_of_best_groups(keys: list[float], config: RoutingConfig, margins: list[float]) -> list[int]:
    size = config.num_experts // config.n_group
    best = [sorted(keys[g * size : (g + 1) * size])[-2:] for g in range(config.n_group)]
    scores = [sum(pair) for pair in best]
    groups = sorted(range(config.n_group), key=lambda group: (-scores[group], group))
    chosen, others = groups[: config.topk_group], groups[config.topk_group :]
    # Sums of other keys that come to the same number do not do so in another precision.
    margins.extend(scores[a] - scores[b] for a in chosen for b in others if best[a] != best[b])
    return [group * size + member for group in groups[: config.topk_group] for member in range(size)]


def _weights(chosen: list[float], row: list[float], config: RoutingConfig) -> list[float]:
    sigmoids = [_sigmoid(x) for x in chosen]
    match config.method:
        case RoutingMethod.DEFAULT:
            total = sum(math.exp(x - max(row)) for x in row)
            return [math.exp(x - max(row)) / total for x in chosen]
        case RoutingMethod.RENORMALIZE | RoutingMethod.RENORMALIZE_NAIVE:
            return _softmax(chosen)
        case RoutingMethod.TOPK:
            return chosen
        case RoutingMethod.SIGMOID_RENORM if config.norm_topk_prob:
            return [value / max(sum(sigmoids), 1e-20) for value in sigmoids]
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            return [value * config.routed_scaling_factor / (sum(sigmoids) + 1e-20) for value in sigmoids]
        case _:
            return sigmoids


def _gaps(descending: list[float]) -> Iterator[float]:
    """Differences of neighbours; equal keys decide nothing that rounding could change."""
    return (high - low for high, low in pairwise(descending) if high != low)
