"""Which returned row is a slot's. One program a block of slots."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def number_slots_kernel(
    row_ptr,  # [num_slots] int32
    rank_of_slot_ptr,  # [num_slots] int32
    slot_ptr,  # [num_slots] int32: its number among those of its rank
    counts_ptr,  # [N, 2] int64
    num_slots,
    num_ranks,
    RANKS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_slot = at < num_slots
    rank = tl.load(rank_of_slot_ptr + at, mask=is_slot, other=-1)
    row = tl.load(slot_ptr + at, mask=is_slot, other=-1)
    ranks = tl.arange(0, RANKS_PAD)
    counts = tl.load(counts_ptr + 2 * ranks + 1, mask=ranks < num_ranks, other=0).to(tl.int32)
    for other in range(num_ranks):
        count = tl.sum(tl.where(ranks == other, counts, 0), 0)
        row += tl.where(other < rank, count, 0)
    tl.store(row_ptr + at, tl.where(rank >= 0, row, -1), mask=is_slot)
