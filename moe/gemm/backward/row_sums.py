"""What slots and rows tell each other around gemm2's dgrad: routing weights on the way in, sums over a row on the way out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.backward.row_sums_kernel import sum_of_slots_kernel, weigh_rows_kernel
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

BLOCK = 256  # slots of a program


def weigh_rows(weights: Tensor, permutation: Permutation) -> Tensor:
    """[P] float32: each slot's routing weight, [T, K], at its row. Rows of no slot are not written."""
    weight_of_row = new_scratch(weights, (permutation.max_rows,), torch.float32)
    num_slots = weights.numel()
    if num_slots:
        _weighing().launch(
            (-(-num_slots // BLOCK), 1, 1),
            permutation.row_of_slot,
            weights,
            weight_of_row,
            numbers=(num_slots,),
        )
    return weight_of_row


def sums_of_slots(row_sums: Tensor, permutation: Permutation) -> Tensor:
    """[T, K] float32 of [blocks, P] float32: each slot's sum over the blocks, in their order; 0 where it has no row."""
    row_of_slot = permutation.row_of_slot
    out = new_scratch(row_sums, tuple(row_of_slot.shape))
    num_slots = row_of_slot.numel()
    if num_slots:
        _summing(row_sums.shape[0]).launch(
            (-(-num_slots // BLOCK), 1, 1),
            row_sums,
            row_of_slot,
            out,
            numbers=(permutation.max_rows, num_slots),
        )
    return out


@functools.cache
def _weighing() -> TritonKernel:
    return TritonKernel(weigh_rows_kernel, BLOCK=BLOCK, num_warps=4)


@functools.cache
def _summing(num_blocks: int) -> TritonKernel:
    return TritonKernel(sum_of_slots_kernel, NUM_BLOCKS=num_blocks, BLOCK=BLOCK, num_warps=4)
