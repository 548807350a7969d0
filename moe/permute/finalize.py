"""Stage 5, host side: weighted sum of each token's K expert rows."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from moe.flow import Added, Permutation, TopK
from moe.permute.added import operands_of
from moe.permute.config import FinalizeConfig
from moe.permute.finalize_kernel import finalize_kernel
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.triton_launch import TritonKernel

COLUMNS_A_WARP = 256  # 16 bytes a lane
MAX_WARPS = 8
DEFAULT_BLOCK_H = 1024
MAX_UNROLLED_CHOICES = 32  # all maps are loaded first; above, code would grow with top_k, and its compilation faster
SPARSE_TOKENS, SPARSE_BLOCK_H = (
    1024,
    8192,
)  # from here on, where few slots have rows, a token's whole row is on its way at once
FEW_TOKENS = 16  # up to here blocks of one warp, to spread a row over more of the GPU


def finalize_tokens(
    rows: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: FinalizeConfig,
    output: Tensor | None = None,
    added: Added | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """Weighted sum of each token's K expert rows: out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]].

    Summed in float32 over k ascending and rounded once, without atomics: the same bits each run. Slots without a row are
    skipped, not multiplied by zero, so rows and weights that no slot uses may be NaN. A token without rows gets zeros.

    Args:
        rows: [P, H] bf16.
        topk: weights [T, K] bf16 or float32, used in the precision they have.
        permutation: row_of_slot [T, K] int32, -1 where the expert is not local.
        config: how many columns a program sums.
        output: [T, H] bf16 to write to, with memory of its own; None allocates.
        added: what a token gets beside its rows, after them in the float32 sum. Each number that is its gate compiles a kernel.
        uses_pdl: the launch is a dependent one of the launch before it, which must be the one that wrote `rows`, itself a
            dependent one or none (`moe.runtime.dependent_launch`).
    Returns:
        [T, H] bf16: `output` itself where given.
    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    """
    config.check(rows, topk, permutation, output, added)
    return launch_finalize_tokens(rows, topk, permutation, config=config, output=output, added=added, uses_pdl=uses_pdl)


def launch_finalize_tokens(
    rows: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: FinalizeConfig,
    output: Tensor | None = None,
    added: Added | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """`finalize_tokens` of tensors that were checked."""
    num_tokens, top_k = permutation.row_of_slot.shape
    hidden_size = rows.shape[1]
    if output is None:
        output = rows.new_empty((num_tokens, hidden_size))
    if not output.numel():
        return output
    is_sparse = bool(config.is_sparse) and num_tokens >= SPARSE_TOKENS
    block_h = config.block_h or _default_block_h(num_tokens <= FEW_TOKENS, is_sparse, hidden_size)
    uses_pdl = uses_pdl and launches_dependents(rows.device)
    values, gate, scale = operands_of(added)
    kernel = _kernel_of(top_k, hidden_size, block_h, is_sparse, uses_pdl, scale)
    num_programs = num_tokens * -(-hidden_size // block_h)
    kernel.launch((num_programs, 1, 1), rows, topk.weights, permutation.row_of_slot, output, values, gate)
    return output


@functools.cache
def _kernel_of(
    top_k: int, hidden_size: int, block_h: int, is_sparse: bool, uses_pdl: bool, scale: float
) -> TritonKernel:
    return TritonKernel(
        finalize_kernel,
        TOP_K=top_k,
        HIDDEN=hidden_size,
        BLOCK_H=block_h,
        IS_UNROLLED=top_k <= MAX_UNROLLED_CHOICES,
        IS_SPARSE=is_sparse,
        ADDED_SCALE=scale,
        USES_PDL=uses_pdl,
        num_warps=min(max(block_h // COLUMNS_A_WARP, 1), MAX_WARPS),
        launch_pdl=uses_pdl,
    )


@functools.cache
def _default_block_h(is_few: bool, is_sparse: bool, hidden_size: int) -> int:
    block_h = SPARSE_BLOCK_H if is_sparse else COLUMNS_A_WARP if is_few else DEFAULT_BLOCK_H
    return min(block_h, max(triton.next_power_of_2(hidden_size), COLUMNS_A_WARP))
