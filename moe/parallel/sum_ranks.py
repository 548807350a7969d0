"""The sum of the ranks' partial sums, host side."""

from __future__ import annotations

import functools

from torch import Tensor

from moe.parallel.sum_ranks_kernel import sum_ranks_kernel
from moe.runtime.triton_launch import TritonKernel

BLOCK, SMALL_BLOCK = 2048, 256
SMALL = 1 << 16  # elements up to which blocks of one warp spread the work over more of the GPU


def sum_ranks(partial: Tensor, num_tokens: int, *, output: Tensor | None = None) -> Tensor:
    """As `moe.parallel.reference.sum_ranks_reference`, in one launch."""
    num_ranks, rows_a_rank, hidden_size = partial.shape
    if output is None:
        output = partial.new_empty(num_tokens, hidden_size)
    num_elements = num_tokens * hidden_size
    if num_elements:
        block = SMALL_BLOCK if num_elements <= SMALL else BLOCK
        _kernel_of(num_ranks, block).launch(
            (-(-num_elements // block), 1, 1), output, partial, numbers=(num_elements, rows_a_rank * hidden_size)
        )
    return output


@functools.cache
def _kernel_of(num_ranks: int, block: int) -> TritonKernel:
    return TritonKernel(sum_ranks_kernel, NUM_RANKS=num_ranks, BLOCK=block, num_warps=max(block // 256, 1))
