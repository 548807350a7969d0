"""Rows by the rank that they go to, host side."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from moe.flow import TopK
from moe.parallel.pack_rows_kernel import pack_rows_kernel
from moe.runtime.triton_launch import TritonKernel

BLOCK_H = 1024
COLUMNS_A_WARP = 256  # 16 bytes a lane


def pack_rows(
    hidden_states: Tensor, rank_of_slot: Tensor, local: TopK, copy: Tensor, counts: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe.parallel.reference.pack_rows_reference`, in one launch."""
    num_tokens, hidden_size = hidden_states.shape
    top_k, num_ranks = rank_of_slot.shape[1], copy.shape[1]
    rows = hidden_states.new_empty(num_rows, hidden_size)
    slots = torch.empty(num_rows, 2, top_k, dtype=torch.int32, device=rows.device)
    row_of_copy = torch.empty_like(copy)
    if num_tokens:
        kernel, num_blocks = _kernel_of(top_k, hidden_size, num_ranks)
        kernel.launch(
            (num_tokens * num_blocks, 1, 1),
            rows,
            slots,
            row_of_copy,
            hidden_states,
            rank_of_slot,
            local.expert_ids,
            local.weights,
            copy,
            counts,
            numbers=(num_ranks,),
        )
    return rows, slots, row_of_copy


@functools.cache
def _kernel_of(top_k: int, hidden_size: int, num_ranks: int) -> tuple[TritonKernel, int]:
    block_h = min(BLOCK_H, triton.next_power_of_2(hidden_size))
    kernel = TritonKernel(
        pack_rows_kernel,
        TOP_K=top_k,
        TOP_K_PAD=triton.next_power_of_2(top_k),
        RANKS_PAD=triton.next_power_of_2(num_ranks),
        HIDDEN=hidden_size,
        BLOCK_H=block_h,
        num_warps=max(block_h // COLUMNS_A_WARP, 1),
    )
    return kernel, -(-hidden_size // block_h)
