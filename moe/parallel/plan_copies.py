"""Numbers of the copies and slots that go to each rank, host side."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from moe.parallel.plan_copies_kernel import plan_copies_kernel
from moe.runtime.triton_launch import TritonKernel

MAX_ELEMENTS, NUM_WARPS = 2048, 16  # slots of a block: four a thread
COUNT_BLOCKS = 4  # blocks that are counted at once


def plan_copies(rank_of_slot: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe.parallel.reference.plan_copies_reference`, in one launch."""
    num_tokens, top_k = rank_of_slot.shape
    device = rank_of_slot.device
    if not num_tokens:
        copy = torch.empty(0, num_ranks, dtype=torch.int32, device=device)
        return copy, torch.empty_like(rank_of_slot), torch.zeros(num_ranks, 2, dtype=torch.int64, device=device)
    copy = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=device)
    slot = torch.empty_like(rank_of_slot)
    counts = torch.empty(num_ranks, 2, dtype=torch.int64, device=device)
    kernel, block = _kernel_of(top_k)
    grid = (num_ranks, -(-num_tokens // block), 1)
    kernel.launch(grid, rank_of_slot, copy, slot, counts, numbers=(num_tokens, num_ranks))
    return copy, slot, counts


@functools.cache
def _kernel_of(top_k: int) -> tuple[TritonKernel, int]:
    padded = triton.next_power_of_2(top_k)
    block = max(MAX_ELEMENTS // padded, 16)
    kernel = TritonKernel(
        plan_copies_kernel,
        TOP_K=top_k,
        TOP_K_PAD=padded,
        BLOCK=block,
        COUNT_BLOCK=COUNT_BLOCKS * block,
        num_warps=NUM_WARPS,
    )
    return kernel, block
