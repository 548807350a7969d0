"""GEMM2 and the weighted sum of a token's K rows, on CUDA cores. One program per (token, block of H)."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moe.fused.few_tokens.tile_device import (
    Choices,
    Rows,
    expert_of_slot,
    first_step,
    load_vector,
    load_weights,
    row_and_column_of_lane,
)


class Operands(NamedTuple):
    """What the slots of a token are multiplied from."""

    choices: Any
    expert_weights_ptr: Any  # [T, TOP_K] bf16 or fp32
    activation_ptr: Any  # [T * TOP_K, IN_FEATURES] bf16
    rows: Any  # Rows of the first local expert's weight
    bias_ptrs: Any  # [BLOCK_N]: the first local expert's bias of those rows, or None


@triton.jit(do_not_specialize=["first_expert", "num_experts"])
def few_token_gemm2_finalize_kernel(
    activation_ptr,  # [T * TOP_K, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, an expert's weight after another
    expert_ids_ptr,  # [T, TOP_K] int32
    expert_weights_ptr,  # [T, TOP_K] bf16 or fp32
    out_ptr,  # [T, OUT_FEATURES] bf16
    added_ptr,  # [T, OUT_FEATURES] bf16 or fp32, or None
    added_gate_ptr,  # [T] bf16 or fp32, or None
    bias_ptr,  # [E_local, OUT_FEATURES] bf16 or fp32, or None
    first_expert,
    num_experts,  # local ones
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_SHUFFLED: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PREFETCHED: tl.constexpr,  # 0 where SKIPS_ABSENT
    SKIPS_ABSENT: tl.constexpr,  # branch around slots without a local expert; else read expert 0 and drop the row
    IS_UNROLLED: tl.constexpr,
    ADDED_SCALE: tl.constexpr,  # what `added` is multiplied by where it has no gate
    USES_PDL: tl.constexpr,
    TRIGGERS: tl.constexpr,  # lets the next kernel start early; else it starts when this one's programs have ended
    num_warps: tl.constexpr,
):
    NUM_STEPS: tl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    IS_EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    first_slot = tl.program_id(0) * TOP_K
    lane = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_lanes = lane < OUT_FEATURES
    row, column = row_and_column_of_lane(lane, False, IS_SHUFFLED)
    choices = Choices(expert_ids_ptr, first_expert, num_experts)
    rows = Rows(weights_ptr + first_step(row, ROW_STRIDE, BLOCK_STRIDE, BLOCK_K), in_lanes)
    bias_ptrs = None if bias_ptr is None else bias_ptr + row
    operands = Operands(choices, expert_weights_ptr, activation_ptr, rows, bias_ptrs)

    # Before the wait: ids, weights and what is added were complete when gemm1's wait returned, and only then did gemm1 trigger this.
    prefetched = ()
    for step in tl.static_range(NUM_PREFETCHED):
        expert, _ = expert_of_slot(choices, first_slot + step // NUM_STEPS)
        rows_of_expert = Rows(rows.ptrs + expert * (OUT_FEATURES * IN_FEATURES), in_lanes)
        weights = load_weights(rows_of_expert, step % NUM_STEPS * BLOCK_K, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N)
        prefetched = prefetched + (weights,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no starred tuples
    if added_ptr is not None:
        added_ptrs = added_ptr + tl.program_id(0).to(tl.int64) * OUT_FEATURES + column
        addend = tl.load(added_ptrs, mask=in_lanes, other=0.0).to(tl.float32)
        if added_gate_ptr is not None:
            addend *= tl.load(added_gate_ptr + tl.program_id(0)).to(tl.float32)
        elif ADDED_SCALE != 1.0:
            addend *= ADDED_SCALE
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGERS:
            tl.extra.cuda.gdc_launch_dependents()

    total = tl.zeros((BLOCK_N,), tl.float32)
    if IS_UNROLLED:
        for choice in tl.static_range(TOP_K):
            prefetched_of_slot = prefetched[choice * NUM_STEPS : (choice + 1) * NUM_STEPS]
            total += _weighted_row(
                operands, first_slot + choice, prefetched_of_slot,
                IN_FEATURES, OUT_FEATURES, BLOCK_STRIDE, SKIPS_ABSENT, IS_EVEN_N, num_warps,
            )  # fmt: skip
    else:
        for choice in range(TOP_K):
            total += _weighted_row(
                operands, first_slot + choice, (),
                IN_FEATURES, OUT_FEATURES, BLOCK_STRIDE, SKIPS_ABSENT, IS_EVEN_N, num_warps,
            )  # fmt: skip
    if added_ptr is not None:
        total += addend
    out_ptrs = out_ptr + tl.program_id(0).to(tl.int64) * OUT_FEATURES + column
    tl.store(out_ptrs, total.to(tl.bfloat16), mask=in_lanes)


@triton.jit
def _weighted_row(
    operands,
    slot,
    prefetched,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SKIPS_ABSENT: tl.constexpr,
    IS_EVEN_N: tl.constexpr,
    num_warps: tl.constexpr,
):
    """[BLOCK_N] fp32: the slot's weight times its row of gemm2, rounded to bf16; zeros where its expert is not local."""
    expert, is_local = expert_of_slot(operands.choices, slot)
    expert_weight = tl.load(operands.expert_weights_ptr + slot).to(tl.float32)
    rows = Rows(operands.rows.ptrs + expert * (OUT_FEATURES * IN_FEATURES), operands.rows.in_lanes)
    vector_ptr = operands.activation_ptr + slot.to(tl.int64) * IN_FEATURES
    if operands.bias_ptrs is not None:
        bias = tl.load(operands.bias_ptrs + expert * OUT_FEATURES, mask=rows.in_lanes, other=0.0).to(tl.float32)
    if SKIPS_ABSENT:
        row = tl.zeros((rows.ptrs.shape[0],), tl.float32)
        if is_local:
            row = _row(rows, vector_ptr, prefetched, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N, num_warps)
    else:
        row = _row(rows, vector_ptr, prefetched, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N, num_warps)
    if operands.bias_ptrs is not None:
        row += bias
    # Selected, not multiplied by zero: an absent slot's activation is uninitialised memory.
    return tl.where(is_local, expert_weight * row.to(tl.bfloat16).to(tl.float32), 0.0)


@triton.jit
def _row(
    rows,
    vector_ptr,
    prefetched,
    IN_FEATURES: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    IS_EVEN_N: tl.constexpr,
    num_warps: tl.constexpr,
):
    """[BLOCK_N] fp32: an expert's rows times one activation; the first steps' weights are the prefetched ones."""
    BLOCK_N: tl.constexpr = rows.ptrs.shape[0]
    BLOCK_K: tl.constexpr = rows.ptrs.shape[1]
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_k in tl.static_range(0, IN_FEATURES, BLOCK_K):
        if first_k // BLOCK_K < len(prefetched):
            weights = prefetched[first_k // BLOCK_K]
        else:
            weights = load_weights(rows, first_k, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N)
        products += weights.to(tl.float32) * load_vector(vector_ptr, first_k, IN_FEATURES, BLOCK_N, BLOCK_K, num_warps)
    return tl.sum(products, 1)
