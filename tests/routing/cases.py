"""Routing configs, and rows of logits with the choice that the total order makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routing.config import RoutingConfig, RoutingMethod

METHODS = list(RoutingMethod)
BY_LOGIT = [m for m in METHODS if m in {"Renormalize", "Llama4", "RenormalizeNaive", "TopK", "TopKSigmoid"}]
BIAS_DTYPES = [None, torch.bfloat16, torch.float32]
DTYPE_IDS = {None: "no-bias", torch.bfloat16: "bf16", torch.float32: "fp32"}

INF, NAN = math.inf, math.nan
NEGATIVE_NAN = torch.tensor(-(1 << 22), dtype=torch.int32).view(torch.float32).item()  # 0xFFC00000


def config_of(method: RoutingMethod, num_experts: int, top_k: int, **fields: object) -> RoutingConfig:
    if method is RoutingMethod.LLAMA4:
        top_k = 1
    return RoutingConfig(num_experts=num_experts, top_k=top_k, method=method, routed_scaling_factor=2.5, **fields)


def grouped(num_experts: int, top_k: int, n_group: int, topk_group: int) -> RoutingConfig:
    return config_of(RoutingMethod.DEEPSEEK_V3, num_experts, top_k, n_group=n_group, topk_group=topk_group)


GROUPED = [
    grouped(256, 8, 8, 4),
    grouped(72, 6, 9, 2),
    grouped(96, 6, 8, 3),  # groups of three lanes
    grouped(12, 4, 3, 3),
    grouped(12, 2, 6, 1),
    grouped(70, 5, 35, 7),  # groups of two, and more of them than lanes
    grouped(8, 8, 2, 2),
]


@dataclass(frozen=True)
class Ranking:
    """A row of logits and the order in which a method that compares raw logits takes them."""

    name: str
    logits: tuple[float, ...]
    order: tuple[int, ...]

    def tensor(self, dtype: torch.dtype) -> Tensor:
        row = torch.tensor([self.logits], dtype=torch.float32)
        if dtype is torch.float32:
            return row
        # by its bits: torch's own conversion makes a negative NaN of a positive one on some CPUs
        return (row.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


RANKINGS = [
    Ranking("equal", (1, 1, 1, 1, 1), (0, 1, 2, 3, 4)),
    Ranking("signed-zeros", (-0.0, 0.0, -0.0, 0.0, -1), (1, 3, 0, 2, 4)),
    Ranking("infinities", (-INF, 2, INF, -INF, INF), (2, 4, 1, 0, 3)),
    Ranking("nan-is-highest", (INF, NAN, 0, NAN, -INF), (1, 3, 0, 2, 4)),
    Ranking("all-nan", (NAN, NAN, NAN, NAN, NAN), (0, 1, 2, 3, 4)),
    Ranking("all-minus-inf", (-INF, -INF, -INF, -INF, -INF), (0, 1, 2, 3, 4)),
    Ranking("smallest", (1e-38, -1e-38, 2e-38, 0, -2e-38), (2, 0, 3, 1, 4)),
]


def negative_nan_row() -> tuple[Tensor, list[int]]:
    """-NaN is below -inf, whatever its payload; the NaN of all ones is no worse than its neighbour."""
    bits = torch.tensor([[-1, -(1 << 22), -(1 << 23), 0x7FC00000, -2, 0]], dtype=torch.int32)
    return bits.view(torch.float32), [3, 5, 2, 1, 0, 4]


def saturated_row() -> tuple[Tensor, list[int]]:
    """Sigmoids of exactly 1 and exactly 0 tie, so the lower id wins; a raw logit would order them otherwise."""
    return torch.tensor([[30.0, -40, 0, 40, -30, 35, 2, -50]]), [0, 3, 5, 6, 2, 1, 4, 7]


def underflown_row() -> tuple[Tensor, list[int]]:
    """Probabilities that underflow to 0 tie."""
    return torch.tensor([[-300.0, -200, 0, -400, -1]]), [2, 4, 0, 1, 3]
