"""Pieces of the few-token kernels: a slot's expert, rows of a stored weight, steps of 16-byte loads along the contraction.

A program takes BLOCK_N lanes. Lanes follow memory, whatever the WeightFormat, and each knows the column that it holds:

    lane l                     stored row, of the first half     second half       column
    not shuffled               l                                 + OUT_FEATURES    l
    gated, shuffled            l in runs of 8, every other run   + 8               l with its runs of 8 interleaved by 2
    gated, interleaved         2 * l                             + 1               l
    not gated, shuffled        l                                 -                 l with its runs of 8 interleaved by 4

Element k of a row lies at k // 64 * BLOCK_STRIDE + k % 64: MajorK or BlockMajorK (`WeightStrides`).
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Choices(NamedTuple):
    """What the tokens chose, and which experts lie here."""

    expert_ids_ptr: Any  # [T, K] int32
    first_expert: Any
    num_experts: Any  # local ones


class Rows(NamedTuple):
    """The rows of an expert's weight that a program's lanes hold."""

    ptrs: Any  # [BLOCK_N, BLOCK_K], of the first step
    in_lanes: Any  # [BLOCK_N] bool


@triton.jit
def expert_of_slot(choices, slot):
    """The slot's local expert as int64, 0 where it is not local, and whether it is."""
    expert = tl.load(choices.expert_ids_ptr + slot)
    # Compared before the subtraction, which may wrap for a garbage id.
    is_local = (expert >= choices.first_expert) & (expert < choices.first_expert + choices.num_experts)
    # int64: all experts' weights pass 2^31 elements.
    return tl.where(is_local, expert - choices.first_expert, 0).to(tl.int64), is_local


@triton.jit
def row_and_column_of_lane(
    lane, IS_GATED: tl.constexpr, IS_SHUFFLED: tl.constexpr, IS_INTERLEAVED: tl.constexpr = False
):
    """Stored row (of the first half where gated) and output column of each lane."""
    if IS_INTERLEAVED:
        return 2 * lane, lane
    if not IS_SHUFFLED:
        return lane, lane
    if IS_GATED:
        run = lane % 16 // 8
        return lane // 16 * 32 + run * 16 + lane % 8, lane // 16 * 16 + lane % 8 * 2 + run
    return lane, lane // 32 * 32 + lane % 8 * 4 + lane % 32 // 8


@triton.jit
def first_step(row, ROW_STRIDE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] int32: where the first BLOCK_K elements of each row lie within an expert's weight."""
    k = tl.arange(0, BLOCK_K)
    return (row * ROW_STRIDE)[:, None] + (k // 64 * BLOCK_STRIDE + k % 64)[None, :]


@triton.jit
def load_weights(
    rows,
    first_k: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    IS_EVEN_N: tl.constexpr,  # all lanes hold a row
):
    """[BLOCK_N, BLOCK_K] bf16: the step from first_k on; zeros past the rows' end.

    Read once, so it is the first to leave the L1 cache, where the vector stays for the other programs.
    """
    BLOCK_K: tl.constexpr = rows.ptrs.shape[1]
    weight_ptrs = rows.ptrs + first_k // 64 * BLOCK_STRIDE
    if first_k + BLOCK_K > IN_FEATURES:
        in_row = tl.arange(0, BLOCK_K) < IN_FEATURES - first_k
        mask = rows.in_lanes[:, None] & in_row[None, :]
        return tl.load(weight_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    if IS_EVEN_N:
        return tl.load(weight_ptrs, eviction_policy="evict_first")
    return tl.load(weight_ptrs, mask=rows.in_lanes[:, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vector(
    vector_ptr,
    first_k: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    num_warps: tl.constexpr,
):
    """fp32: the vector's step from first_k on, zeros past its end, to be multiplied by load_weights' [BLOCK_N, BLOCK_K]."""
    k = (first_k + tl.arange(0, BLOCK_K))[None, :]
    if 256 * num_warps > BLOCK_K:
        # Warps lie along the lanes too. Each loads the step for its own: handing a step round takes shared memory and
        # barriers, which keep the loads of the steps apart.
        k = tl.broadcast_to(k, BLOCK_N, BLOCK_K)
    if first_k + BLOCK_K > IN_FEATURES:
        vector = tl.load(vector_ptr + k, mask=k < IN_FEATURES, other=0.0)
    else:
        vector = tl.load(vector_ptr + k)
    return vector.to(tl.float32)
