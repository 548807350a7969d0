"""How many rows each expert got, and the operations and bytes that this costs each stage at the least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe.cli.layer import Inputs, Layer
from moe.shapes import MoEShape

BF16, INT32, FLOAT32 = 2, 4, 4  # bytes an element


@dataclass(frozen=True)
class Load:
    """Rows of the local experts."""

    rows_of_expert: list[int]  # real rows, without padding
    num_rows: int  # rows in use, padding included
    tile_rows: int

    @property
    def num_real(self) -> int:
        return sum(self.rows_of_expert)

    @property
    def num_active(self) -> int:
        return sum(1 for rows in self.rows_of_expert if rows)

    @property
    def imbalance(self) -> float:
        """The busiest expert's rows over the mean; 1 is perfect balance, 0 means no rows at all."""
        return max(self.rows_of_expert) * len(self.rows_of_expert) / self.num_real if self.num_real else 0.0

    @property
    def padding_share(self) -> float:
        return 1 - self.num_real / self.num_rows if self.num_rows else 0.0


@dataclass(frozen=True)
class Cost:
    """Operations on matrix units, 2 a multiply-add, and the fewest bytes moved."""

    flops: float
    num_bytes: float


def measure_load(layer: Layer, inputs: Inputs) -> Load:
    """Counted from the chosen ids, not from the permutation, which a faulty stage could have wrong."""
    first, num_local = layer.config.permute.local_expert_offset, layer.shape.num_local_experts
    local = inputs.topk.expert_ids.flatten().long().cpu() - first
    counts = torch.bincount(local[(local >= 0) & (local < num_local)], minlength=num_local)
    return Load(counts.tolist(), int(inputs.permutation.num_rows.item()), inputs.permutation.tile_rows)


def stage_costs(shape: MoEShape, num_tokens: int, load: Load) -> dict[str, Cost]:
    """By stage; and of the whole with and without routing, where no byte passes between stages."""
    slots = num_tokens * shape.top_k
    rows, active = load.num_real, load.num_active
    hidden, inner = shape.hidden_size, shape.intermediate_size
    w1 = (2 if shape.is_gated else 1) * hidden * inner
    w2 = hidden * inner
    whole = Cost(shape.flops(rows), shape.bytes_moved(num_tokens, active))
    return {
        "route": Cost(0, num_tokens * shape.num_experts * FLOAT32 + slots * (INT32 + BF16)),
        "permute": Cost(0, (2 * slots + load.num_rows) * INT32),
        "gemm1": Cost(2 * rows * w1, BF16 * (active * w1 + min(rows, num_tokens) * hidden + rows * inner)),
        "gemm2": Cost(2 * rows * w2, BF16 * (active * w2 + rows * (inner + hidden))),
        "finalize": Cost(0, BF16 * (rows + num_tokens) * hidden + slots * (INT32 + BF16)),
        "whole": whole,
        "experts": whole,
    }


def mean_costs(costs: list[dict[str, Cost]]) -> dict[str, Cost]:
    """By stage, over input sets."""
    return {
        name: Cost(
            sum(cost[name].flops for cost in costs) / len(costs),
            sum(cost[name].num_bytes for cost in costs) / len(costs),
        )
        for name in costs[0]
    }
