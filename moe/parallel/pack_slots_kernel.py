"""Ids and weights in one tensor, padded. One program a block of slots."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def pack_slots_kernel(
    packed_ptr,  # [2, M, TOP_K] int32
    ids_ptr,  # [T, TOP_K] int32
    weights_ptr,  # [T, TOP_K] bf16 or fp32
    num_slots,  # T * TOP_K
    num_padded,  # M * TOP_K
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_slots
    is_padded = slot < num_padded
    weight = tl.load(weights_ptr + slot, mask=is_slot, other=0.0).to(tl.float32)
    tl.store(packed_ptr + slot, tl.load(ids_ptr + slot, mask=is_slot, other=-1), mask=is_padded)
    tl.store(packed_ptr + num_padded + slot, weight.to(tl.int32, bitcast=True), mask=is_padded)
