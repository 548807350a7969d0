"""Weighted sum of each token's K expert rows. One program per (token, block of H)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def finalize_kernel(
    rows_ptr,  # [P, HIDDEN] bf16
    weights_ptr,  # [T, TOP_K] bf16 or fp32
    row_of_slot_ptr,  # [T, TOP_K] int32
    output_ptr,  # [T, HIDDEN] bf16
    added_ptr,  # [T, HIDDEN] bf16 or fp32, or None
    added_gate_ptr,  # [T] bf16 or fp32, or None
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_UNROLLED: tl.constexpr,  # over the choices; else the loop stays one, and maps are read in it
    IS_SPARSE: tl.constexpr,  # most slots have no row, and each is branched over
    ADDED_SCALE: tl.constexpr,  # what `added` is multiplied by where it has no gate
    USES_PDL: tl.constexpr,
):
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    # int64 first: a row times HIDDEN overflows int32 past 300k rows at 7168 columns.
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column < HIDDEN
    row_of_choice = ()
    weight_of_choice = ()
    if IS_UNROLLED:
        for choice in tl.static_range(TOP_K):
            row, weight = _load_slot(row_of_slot_ptr, weights_ptr, token * TOP_K + choice)
            row_of_choice = row_of_choice + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no starred tuples
            weight_of_choice = weight_of_choice + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    if added_ptr is not None:
        addend = tl.load(added_ptr + token * HIDDEN + column, mask=in_row, other=0.0).to(tl.float32)
        if added_gate_ptr is not None:
            addend *= tl.load(added_gate_ptr + token).to(tl.float32)
        elif ADDED_SCALE != 1.0:
            addend *= ADDED_SCALE
    if USES_PDL:
        # Before it, only what was complete when gemm2 began: the maps and weights, and what the caller passed.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK_H], tl.float32)
    if IS_UNROLLED:
        for choice in tl.static_range(TOP_K):
            row = row_of_choice[choice]
            total = _plus_row(total, weight_of_choice[choice], rows_ptr, row, column, in_row, HIDDEN, IS_SPARSE)
    else:
        for choice in range(TOP_K):
            row, weight = _load_slot(row_of_slot_ptr, weights_ptr, token * TOP_K + choice)
            total = _plus_row(total, weight, rows_ptr, row, column, in_row, HIDDEN, IS_SPARSE)
    if added_ptr is not None:
        total += addend
    tl.store(output_ptr + token * HIDDEN + column, total.to(tl.bfloat16), mask=in_row)


@triton.jit
def _load_slot(row_of_slot_ptr, weights_ptr, slot):
    """The slot's row as int64, and its weight as float32, 0 where it has no row."""
    row = tl.load(row_of_slot_ptr + slot).to(tl.int64)
    # Masked, not branched, so that a row can be loaded before the one before it has come. Neither factor of a slot
    # without a row is read, and 0 * 0 leaves the sum as it is.
    return row, tl.load(weights_ptr + slot, mask=row >= 0, other=0.0).to(tl.float32)


@triton.jit
def _plus_row(total, weight, rows_ptr, row, column, in_row, HIDDEN: tl.constexpr, IS_SPARSE: tl.constexpr):
    """The total and a row's columns times its weight, where there is a row."""
    if IS_SPARSE:
        if row >= 0:
            total += weight * tl.load(rows_ptr + row * HIDDEN + column, mask=in_row, other=0.0).to(tl.float32)
    else:
        # Compared as a tensor: the interpreter of Triton 3.9 takes no tensor & scalar for a mask.
        has_row = tl.broadcast_to(row, column.shape) >= 0
        total += weight * tl.load(rows_ptr + row * HIDDEN + column, mask=in_row & has_row, other=0.0).to(tl.float32)
    return total
