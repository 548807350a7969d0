"""Which returned row is a slot's, host side."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from moe.parallel.number_slots_kernel import number_slots_kernel
from moe.runtime.triton_launch import TritonKernel

BLOCK = 256


def number_slots(rank_of_slot: Tensor, slot: Tensor, counts: Tensor) -> Tensor:
    """As `moe.parallel.reference.number_slots_reference`, in one launch."""
    rows = torch.empty_like(slot)
    num_slots = slot.numel()
    if num_slots:
        grid, num_ranks = (-(-num_slots // BLOCK), 1, 1), counts.shape[0]
        _kernel_of(num_ranks).launch(grid, rows, rank_of_slot, slot, counts, numbers=(num_slots, num_ranks))
    return rows


@functools.cache
def _kernel_of(num_ranks: int) -> TritonKernel:
    return TritonKernel(number_slots_kernel, RANKS_PAD=triton.next_power_of_2(num_ranks), BLOCK=BLOCK, num_warps=4)
