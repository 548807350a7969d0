"""Which returned row is a slot's, host side."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.parallel.number_slots_kernel import number_slots_kernel
from moe.runtime.triton_launch import TritonKernel

BLOCK = 256


def number_slots(rank_of_slot: Tensor, slot: Tensor, counts: Tensor) -> Tensor:
    """As `moe.parallel.reference.number_slots_reference`, in one launch."""
    rows = torch.empty_like(slot)
    num_slots = slot.numel()
    if num_slots:
        grid = (-(-num_slots // BLOCK), 1, 1)
        _kernel().launch(grid, rows, rank_of_slot, slot, counts, numbers=(num_slots, counts.shape[0]))
    return rows


@functools.cache
def _kernel() -> TritonKernel:
    return TritonKernel(number_slots_kernel, BLOCK=BLOCK, num_warps=4)
