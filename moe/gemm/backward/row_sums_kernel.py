"""Routing weights of slots to rows, and sums of rows back to slots. One program a block of slots."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_slots"])
def weigh_rows_kernel(
    row_of_slot_ptr,  # [T, K] int32
    weights_ptr,  # [T, K] bf16 or fp32
    weight_of_row_ptr,  # [P] fp32; padding rows are not written
    num_slots,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_slot_ptr + slot, mask=slot < num_slots, other=-1)
    weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0)
    tl.store(weight_of_row_ptr + row, weight.to(tl.float32), mask=row >= 0)


@triton.jit(do_not_specialize=["max_rows", "num_slots"])
def sum_of_slots_kernel(
    row_sums_ptr,  # [NUM_BLOCKS, P] fp32
    row_of_slot_ptr,  # [T, K] int32
    out_ptr,  # [T, K] fp32
    max_rows,
    num_slots,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_slot_ptr + slot, mask=slot < num_slots, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    row_ptrs = row_sums_ptr + row
    for _ in range(NUM_BLOCKS):
        total += tl.load(row_ptrs, mask=row >= 0, other=0.0)
        row_ptrs += max_rows  # a step at a time: all of them together pass 2^31
    tl.store(out_ptr + slot, total, mask=slot < num_slots)
