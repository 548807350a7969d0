"""Ids of experts as callers hold them -> int32 ids of experts that lie here. One program per BLOCK ids."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_ids", "num_experts"])
def map_ids_kernel(
    ids_ptr,  # [N] of any integer dtype
    map_ptr,  # [num_experts] int32 or int64, the place of each expert here, or negative; None: all are here
    mapped_ptr,  # [N] int32
    num_ids,
    num_experts,
    BLOCK: tl.constexpr,
):
    # int64 first: N passes 2^31 where tokens times choices do.
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_ids
    # A uint64 of 2^63 or more becomes negative, and is no expert either.
    expert = tl.load(ids_ptr + slot, mask=is_slot, other=0).to(tl.int64)
    is_known = (expert >= 0) & (expert < num_experts)
    place = expert
    if map_ptr is not None:
        place = tl.load(map_ptr + expert, mask=is_slot & is_known, other=-1).to(tl.int64)
    tl.store(mapped_ptr + slot, tl.where(is_known, place, -1).to(tl.int32), mask=is_slot)
