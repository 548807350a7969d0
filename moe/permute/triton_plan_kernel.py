"""Count the slots of each expert, scan the counts, place each slot.

A slot's row is the first row of its expert, plus the expert's slots in earlier blocks, plus those before it in its own
block. A program takes the first two from the histograms that it made (`plan_kernel`) or that two launches before it made
(`count_kernel`, `scan_kernel`, then `place_kernel`), and finds the last by comparing the slots of its block in pairs.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

COMPARED = tl.constexpr(32)  # ids that a block is compared with at once
PADDED = tl.constexpr(16)  # padding rows of an expert written at once: divides every TILE_ROWS


@triton.jit(do_not_specialize=["num_slots", "first_expert", "num_experts"])
def plan_kernel(
    expert_ids_ptr,  # [T, K] int32
    row_of_slot_ptr,  # [T, K] int32
    token_of_row_ptr,  # [P] int32
    expert_of_tile_ptr,  # [P / TILE_ROWS] int32
    row_limit_of_tile_ptr,  # [P / TILE_ROWS] int32
    num_rows_ptr,  # [1] int32
    num_tiles_ptr,  # [1] int32
    num_slots,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The whole plan in one launch. A program counts all slots and places one block of them."""
    start = tl.program_id(0) * BLOCK
    count = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, num_slots, COUNTED):
        slot = first + tl.arange(0, COUNTED)
        expert, is_local = _load_experts(expert_ids_ptr, slot, num_slots, first_expert, num_experts)
        count += tl.histogram(expert, BINS, mask=is_local)
        before += tl.histogram(expert, BINS, mask=is_local & (slot < start))
    first_row = _first_rows(count, num_rows_ptr, num_tiles_ptr, TILE_ROWS)
    _place_block(
        expert_ids_ptr,
        row_of_slot_ptr,
        token_of_row_ptr,
        expert_of_tile_ptr,
        row_limit_of_tile_ptr,
        first_row,
        count,
        before,
        start,
        num_slots,
        first_expert,
        num_experts,
        TOP_K,
        TILE_ROWS,
        BLOCK,
    )


@triton.jit(do_not_specialize=["num_slots", "chunk_slots", "first_expert", "num_experts"])
def count_kernel(
    expert_ids_ptr,  # [T, K] int32
    counts_ptr,  # [num_chunks, num_experts] int32
    num_slots,
    chunk_slots,
    first_expert,
    num_experts,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the slots of each expert in one chunk."""
    start = tl.program_id(0) * chunk_slots
    count = tl.zeros([BINS], tl.int32)
    for first in range(start, min(start + chunk_slots, num_slots), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        expert, is_local = _load_experts(expert_ids_ptr, slot, num_slots, first_expert, num_experts)
        count += tl.histogram(expert, BINS, mask=is_local)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + expert, count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_chunks", "num_experts"])
def scan_kernel(
    counts_ptr,  # [num_chunks, num_experts] int32
    slots_before_ptr,  # [num_chunks + 1, num_experts] int32: slots of an expert in earlier chunks; last, in all
    num_chunks,
    num_experts,
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Sum the counts of a block of experts over the chunks."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    before = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        offset = chunk[:, None] * num_experts + expert[None, :]
        is_count = (chunk < num_chunks)[:, None] & (expert < num_experts)[None, :]
        count = tl.load(counts_ptr + offset, mask=is_count, other=0)
        tl.store(slots_before_ptr + offset, before[None, :] + tl.cumsum(count, 0) - count, mask=is_count)
        before += tl.sum(count, 0)
    tl.store(slots_before_ptr + num_chunks * num_experts + expert, before, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_slots", "chunk_slots", "first_expert", "num_experts", "num_chunks"])
def place_kernel(
    expert_ids_ptr,  # [T, K] int32
    slots_before_ptr,  # [num_chunks + 1, num_experts] int32
    row_of_slot_ptr,  # [T, K] int32
    token_of_row_ptr,  # [P] int32
    expert_of_tile_ptr,  # [P / TILE_ROWS] int32
    row_limit_of_tile_ptr,  # [P / TILE_ROWS] int32
    num_rows_ptr,  # [1] int32
    num_tiles_ptr,  # [1] int32
    num_slots,
    chunk_slots,
    first_expert,
    num_experts,
    num_chunks,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Place the slots of one chunk, block by block."""
    expert = tl.arange(0, BINS)
    is_expert = expert < num_experts
    count = tl.load(slots_before_ptr + num_chunks * num_experts + expert, mask=is_expert, other=0)
    before = tl.load(slots_before_ptr + tl.program_id(0) * num_experts + expert, mask=is_expert, other=0)
    first_row = _first_rows(count, num_rows_ptr, num_tiles_ptr, TILE_ROWS)
    start = tl.program_id(0) * chunk_slots
    for first in range(start, min(start + chunk_slots, num_slots), BLOCK):
        before += _place_block(
            expert_ids_ptr,
            row_of_slot_ptr,
            token_of_row_ptr,
            expert_of_tile_ptr,
            row_limit_of_tile_ptr,
            first_row,
            count,
            before,
            first,
            num_slots,
            first_expert,
            num_experts,
            TOP_K,
            TILE_ROWS,
            BLOCK,
        )


@triton.jit
def _load_experts(expert_ids_ptr, slot, num_slots, first_expert, num_experts):
    """Local ids of the slots' experts, 0 where the expert is not local, and whether it is."""
    expert = tl.load(expert_ids_ptr + slot, mask=slot < num_slots, other=-1)
    # Compared before the subtraction, which may wrap for a garbage id.
    is_local = (expert >= first_expert) & (expert < first_expert + num_experts)
    return tl.where(is_local, expert - first_expert, 0), is_local


@triton.jit
def _first_rows(count, num_rows_ptr, num_tiles_ptr, TILE_ROWS: tl.constexpr):
    """First row of each expert, from its number of slots. The first program writes the totals."""
    num_tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    if tl.program_id(0) == 0:
        total = tl.sum(num_tiles, 0)
        tl.store(num_tiles_ptr, total)
        tl.store(num_rows_ptr, total * TILE_ROWS)
    return (tl.cumsum(num_tiles, 0) - num_tiles) * TILE_ROWS


@triton.jit
def _place_block(
    expert_ids_ptr,
    row_of_slot_ptr,
    token_of_row_ptr,
    expert_of_tile_ptr,
    row_limit_of_tile_ptr,
    first_row,  # [BINS] of each expert
    count,  # [BINS] slots of each expert
    before,  # [BINS] slots of each expert before this block
    start,
    num_slots,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write all that follows from slots [start, start + BLOCK), and return how many of them each expert has."""
    slot = start + tl.arange(0, BLOCK)
    expert, is_local = _load_experts(expert_ids_ptr, slot, num_slots, first_expert, num_experts)
    rank = tl.gather(before, expert, 0)
    for first in range(start, min(start + BLOCK, num_slots), COMPARED):
        other_slot = first + tl.arange(0, COMPARED)
        other, is_other_local = _load_experts(expert_ids_ptr, other_slot, num_slots, first_expert, num_experts)
        is_earlier = is_other_local[:, None] & (other_slot[:, None] < slot[None, :])
        rank += tl.sum((is_earlier & (other[:, None] == expert[None, :])).to(tl.int32), 0)

    segment = tl.gather(first_row, expert, 0)
    row = segment + rank
    tl.store(row_of_slot_ptr + slot, tl.where(is_local, row, -1), mask=slot < num_slots)
    tl.store(token_of_row_ptr + row, slot // TOP_K, mask=is_local)

    row_limit = segment + tl.gather(count, expert, 0)
    is_first_of_tile = is_local & (rank % TILE_ROWS == 0)
    tl.store(expert_of_tile_ptr + row // TILE_ROWS, expert, mask=is_first_of_tile)
    tl.store(row_limit_of_tile_ptr + row // TILE_ROWS, row_limit, mask=is_first_of_tile)

    is_last = is_local & (row + 1 == row_limit)
    if tl.max(is_last.to(tl.int32), 0) > 0:
        padded_limit = (row_limit + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        for first in range(0, TILE_ROWS, PADDED):
            padding = (row_limit + first)[:, None] + tl.arange(0, PADDED)[None, :]
            is_padding = is_last[:, None] & (padding < padded_limit[:, None])
            tl.store(token_of_row_ptr + padding, -1, mask=is_padding)
    return tl.histogram(expert, first_row.shape[0], mask=is_local)
