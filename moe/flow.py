"""The values that pass between stages. Stages meet here and never import one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Which experts each token goes to, and how much each counts."""

    expert_ids: Tensor  # [T, K] int32, global ids, best first; out of [0, E) for an unused slot
    weights: Tensor  # [T, K] bfloat16 or float32

    @property
    def slot_by_slot(self) -> TopK:
        """The same slots as tokens with one choice each."""
        return TopK(self.expert_ids.view(-1, 1), self.weights.view(-1, 1))


@dataclass(frozen=True)
class WeighedSlots:
    """Each slot's token times its weight, where weights go into the input of experts, and the weights that are left: ones."""

    hidden_states: Tensor  # [T * K, H] bfloat16, by slot; undefined where the slot's expert is not local
    topk: TopK  # the same experts


@dataclass(frozen=True)
class UnitSize:
    """How rows of an expert are cut into units: into as few as `max_rows` allows.

    They share its rows evenly, but start at multiples of `multiple` of them. Up to `max_group` neighbours are a group.
    """

    max_rows: int
    multiple: int
    max_group: int


@dataclass(frozen=True)
class RowUnits:
    """Runs of rows of one expert, for kernels whose blocks of threads take one run after another."""

    records: Tensor  # [5, max_units] int32: expert, first row, real rows, first unit of its group, units of its group
    counts: Tensor  # [2] int32: number of units, and 0, with which a kernel counts and which it leaves at 0
    size: UnitSize
    stream: int  # handle of the CUDA stream that orders all kernels that count with `counts`

    @property
    def max_units(self) -> int:
        """Columns of `records`; those from counts[0] on are undefined."""
        return self.records.shape[1]


@dataclass(frozen=True)
class Permutation:
    """Where each (token, choice) slot sits once rows are grouped by local expert.

    Rows of an expert are contiguous, in token order, and padded to a multiple of `tile_rows`;
    experts follow one another in ascending local id. An expert that no token chose has no rows.

    Example, T=2 K=2 E=3, tile_rows=2, expert_ids [[2, 0], [2, 1]]:

        rows                0   1   2   3   4   5
        expert              0   0   1   1   2   2
        token_of_row        0  -1   1  -1   0   1
        row_of_slot         [[4, 0], [5, 2]]
        expert_of_tile      [0, 1, 2]
        row_limit_of_tile   [1, 3, 6]

    Entries from `num_rows` (rows) and `num_tiles` (tiles) on are undefined.
    In flashinfer's words: row_of_slot is expanded_idx_to_permuted_idx, token_of_row is
    permuted_idx_to_token_idx, expert_of_tile is cta_idx_xy_to_batch_idx, row_limit_of_tile is
    cta_idx_xy_to_mn_limit, num_rows is total_num_padded_tokens, num_tiles is num_non_exiting_ctas.
    """

    row_of_slot: Tensor  # [T, K] int32, -1 where the expert is not local
    token_of_row: Tensor  # [P] int32, -1 on padding rows
    expert_of_tile: Tensor  # [P / tile_rows] int32, local ids
    row_limit_of_tile: Tensor  # [P / tile_rows] int32, one past the last real row of the tile's expert
    num_rows: Tensor  # [1] int32, on the device: rows in use, padding included
    num_tiles: Tensor  # [1] int32, on the device: num_rows / tile_rows
    tile_rows: int
    mean_rows: int = 0  # rows of an expert in the mean, as the host reckons from T; 0 where nobody said
    units: RowUnits | None = None  # where the planner made them too

    @property
    def max_rows(self) -> int:
        """P, the upper bound on rows that the host computed from T."""
        return self.token_of_row.shape[0]

    @property
    def max_tiles(self) -> int:
        """P / tile_rows."""
        return self.expert_of_tile.shape[0]


@dataclass(frozen=True)
class SwigluParams:
    """Per-expert parameters of SwiGLU, each [E_local] float32 or None.

    act = gate' * sigmoid(alpha * gate') * (up' + beta), with gate' = min(gate, clamp_limit) and
    up' = clamp(up, -clamp_limit, clamp_limit). None means alpha 1, beta 0, no clamp.
    gpt-oss uses alpha 1.702, beta 1, clamp_limit 7.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    clamp_limit: Tensor | None = None


@dataclass(frozen=True)
class Added:
    """What a token gets beside its experts, such as a shared expert's result: summed with their weighted rows before the rounding.

    out[t] = bf16(sum over k of weights[t, k] * row + gate[t] * values[t]), in float32 and in this order.
    """

    values: Tensor  # [T, H] bfloat16 or float32
    gate: Tensor | float | None = None  # [T] bfloat16 or float32, or one number for all tokens; None: 1


@dataclass(frozen=True)
class ExpertOutputs:
    """What the pipeline has before finalize: out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]].

    Skip slots whose row is -1 rather than multiply them by zero: rows that no slot names are
    uninitialised memory and may be NaN.
    """

    rows: Tensor  # [P, H] bfloat16, unweighted
    weights: Tensor  # [T, K] bfloat16 or float32
    row_of_slot: Tensor  # [T, K] int32, -1 where the expert is not local


class KeptGemm1(NamedTuple):
    """What a gemm1 of a call that will go backward gives. Padding rows of both are undefined."""

    activation: Tensor  # [P, I] bfloat16, bit for bit what gemm1 alone gives
    gate_up: (
        Tensor  # [P, 2I], or [P, I] where not gated, bfloat16: the product, columns in the order of W1's stored rows
    )


class Gemm2Gradients(NamedTuple):
    """What is known once gradients have passed gemm2 and the activation.

    Padding rows of the first two are exact zeros, since weight gradients sum over them; rows from `num_rows` on are undefined.
    """

    grad_gate_up: Tensor  # [P, 2I] or [P, I] bfloat16, columns as KeptGemm1.gate_up has them
    weighted_activation: Tensor  # [P, I] bfloat16: the activation times its slot's routing weight
    grad_weights: Tensor  # [T, K] float32, of the routing weights; exactly 0 where a slot has no row
