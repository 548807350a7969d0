"""How rows are grouped by expert, and how they are summed back."""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe.base_config import Count, CountOrZero, FrozenConfig, PowerOfTwo
from moe.checks import expect, expect_separate, expect_type, is_as_expected
from moe.flow import Added, Permutation, TopK
from moe.permute.added import check_added, tensors_of
from moe.permute.chunks import NUMBA_CHUNKING, TRITON_CHUNKING

MIN_TILE_ROWS = 16  # fewest rows that a tensor-core instruction of any GPU takes
MAX_TILE_ROWS = 128
MAX_MEAN_OF_FEWEST = 12
WEIGHT_DTYPES = (torch.bfloat16, torch.float32)


class PermuteConfig(FrozenConfig):
    """Stage 2: experts [local_expert_offset, local_expert_offset + num_local_experts) of num_experts lie here."""

    num_experts: Count
    num_local_experts: Count
    top_k: Count
    local_expert_offset: CountOrZero = 0
    tile_rows: PowerOfTwo | None = Field(default=None, ge=MIN_TILE_ROWS, le=MAX_TILE_ROWS)  # None: by token count

    @model_validator(mode="after")
    def _slice_lies_within(self) -> PermuteConfig:
        if self.num_local_experts > self.num_experts:
            raise ValueError(
                "local_num_experts must be between 1 and num_experts: "
                f"got local_num_experts={self.num_local_experts}, num_experts={self.num_experts}"
            )
        if self.local_expert_offset + self.num_local_experts > self.num_experts:
            raise ValueError(
                "expert offset and count must be within valid range: got "
                f"local_expert_offset={self.local_expert_offset}, local_num_experts={self.num_local_experts}, "
                f"num_experts={self.num_experts}; their sum may reach num_experts at most"
            )
        return self

    def mean_rows(self, num_tokens: int) -> int:
        """Rows of an expert, local or not, in the mean, rounded up."""
        return -(-num_tokens * self.top_k // self.num_experts)

    def rows_per_tile(self, num_tokens: int) -> int:
        """Rows that each expert's segment is padded to: a power of two within [16, 128], by the mean load.

        So many that about one expert in fifty has more than a tile: under uniform routing loads vary by their root. Up to a mean
        of 12 it is 16 all the same, which was faster more often than not (docs/measured_facts.md).
        """
        if self.tile_rows is not None:
            return self.tile_rows
        mean = self.mean_rows(num_tokens)
        wanted = mean + 2 * math.sqrt(mean) if mean > MAX_MEAN_OF_FEWEST else MIN_TILE_ROWS
        return min(max(1 << math.ceil(wanted - 1).bit_length(), MIN_TILE_ROWS), MAX_TILE_ROWS)

    def max_rows(self, num_tokens: int) -> int:
        """P: rows in the worst case, when every chosen expert is local and as many tiles as possible are ragged."""
        num_slots = num_tokens * self.top_k
        tile_rows = self.rows_per_tile(num_tokens)
        num_active = min(self.num_local_experts, num_slots)
        return (num_active + (num_slots - num_active) // tile_rows) * tile_rows

    def scratch_bytes(self, num_tokens: int) -> tuple[int, int]:
        """Bytes of the counts that a plan keeps beside its result, at the most: of two tensors, for up to so many tokens."""
        num_slots, num_experts = num_tokens * self.top_k, self.num_local_experts
        in_triton, in_numba = (
            chunking.most_counts(num_slots, num_experts) for chunking in (TRITON_CHUNKING, NUMBA_CHUNKING)
        )
        return 4 * max(in_triton, in_numba), 4 * (in_triton + num_experts)  # counts; sums and totals

    def check(self, topk: TopK) -> None:
        """Raise unless topk has expert_ids [T, K] int32 and weights [T, K] bf16 or fp32 on one device."""
        if not self._fits(topk):
            expect_type("topk", topk, TopK, "moe.TopK(expert_ids, weights) makes one")
            ids, dims = topk.expert_ids, {"K": self.top_k}
            expect("expert_ids", ids, "T K", dims, dtype=torch.int32, words=_IDS_WORDS)
            device = ids.device
            expect(
                "expert_weights", topk.weights, "T K", dims, dtype=WEIGHT_DTYPES, device=device, words=_WEIGHTS_WORDS
            )
        self.check_num_tokens(topk.expert_ids.shape[0])

    def check_weighed(self, hidden_states: Tensor, topk: TopK) -> None:
        """Raise unless topk passes `check` and hidden_states is [T, H] bf16 on its device."""
        self.check(topk)
        ids = topk.expert_ids
        expect("hidden_states", hidden_states, "T H", {"T": ids.shape[0]}, dtype=torch.bfloat16, device=ids.device)

    def _fits(self, topk: TopK) -> bool:
        """Whether both tensors are as `check` wants them: told without messages, which take time to make."""
        if not isinstance(topk, TopK):
            return False
        ids, weights = topk.expert_ids, topk.weights
        if not isinstance(ids, Tensor) or not isinstance(weights, Tensor) or not ids.dim():
            return False
        shape, dtype = (ids.shape[0], self.top_k), weights.dtype
        return (
            is_as_expected(ids, shape, torch.int32)
            and dtype in WEIGHT_DTYPES
            and is_as_expected(weights, shape, dtype, ids.device)
        )

    def check_num_tokens(self, num_tokens: int) -> None:
        """Raise unless rows can be numbered in int32."""
        if num_tokens * self.top_k * MAX_TILE_ROWS < 1 << 31:  # a tile a slot, which needs no closer look
            return
        if self.max_rows(num_tokens) >= 1 << 31:
            raise ValueError(
                f"num_tokens: expected fewer than 2^31 rows, got num_tokens={num_tokens} with top_k={self.top_k}, "
                f"{self.max_rows(num_tokens)} rows with padding; split the batch"
            )


class FinalizeConfig(FrozenConfig):
    """Stage 5: how the weighted sum is cut into programs."""

    block_h: PowerOfTwo | None = Field(default=None, ge=64, le=8192)  # columns a program; None: by token count
    # Whether most slots have no row, which many tokens then branch over, with the same result; None: by the share of experts here.
    is_sparse: bool | None = None

    def check(
        self, rows: Tensor, topk: TopK, permutation: Permutation, output: Tensor | None, added: Added | None = None
    ) -> None:
        """Raise unless rows is [P, H] bf16, the maps are [T, K], and output is [T, H] bf16 memory of its own or None.

        So is what is added: [T, H], and its gate [T].
        """
        row_of_slot, weights, max_rows = permutation.row_of_slot, topk.weights, permutation.max_rows
        device = row_of_slot.device
        if not _fit(rows, weights, row_of_slot, max_rows):
            dims = {"P": max_rows}
            expect("row_of_slot", row_of_slot, "T K", dims, dtype=torch.int32)
            expect("expert_weights", weights, "T K", dims, dtype=WEIGHT_DTYPES, device=device)
            expect("rows", rows, "P H", dims, dtype=torch.bfloat16, device=device)
        if added is not None:
            check_added(added, row_of_slot.shape[0], rows.shape[1], device)
        if output is not None:
            dims = {"T": row_of_slot.shape[0], "H": rows.shape[1]}
            expect("output", output, "T H", dims, dtype=torch.bfloat16, device=device)
            read = {"rows": rows, "expert_weights": weights, "row_of_slot": row_of_slot}
            expect_separate("output", output, read | tensors_of(added))


_IDS_WORDS = {
    "rank": "expert_indices must be 2D.",
    "K": "expert_indices dim1 must match top_k.",
    "dtype": "expert_indices must be int32.",
}
_WEIGHTS_WORDS = {"dtype": "expert_weights must be bfloat16 or float32."}


def _fit(rows: Tensor, weights: Tensor, row_of_slot: Tensor, max_rows: int) -> bool:
    """Whether all of these are as `FinalizeConfig.check` wants them: told without messages, which take time to make."""
    if not isinstance(rows, Tensor) or not isinstance(weights, Tensor) or rows.dim() != 2 or row_of_slot.dim() != 2:
        return False
    shape, device, dtype = tuple(row_of_slot.shape), row_of_slot.device, weights.dtype
    return (
        is_as_expected(row_of_slot, shape, torch.int32)
        and dtype in WEIGHT_DTYPES
        and is_as_expected(weights, shape, dtype, device)
        and is_as_expected(rows, (max_rows, rows.shape[1]), torch.bfloat16, device)
    )
