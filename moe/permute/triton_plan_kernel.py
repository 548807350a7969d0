"""Count the slots of each expert, scan the counts, place each slot.

A slot's row is the first row of its expert, plus the expert's slots in earlier blocks, plus those before it in its own
block. A program takes the first two from the histograms that it made (`plan_kernel`) or that two launches before it made
(`count_kernel`, `scan_kernel`, then `place_kernel`), and finds the last by comparing the slots of its block in pairs.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

COMPARED = tl.constexpr(32)  # ids that a block is compared with at once
PADDED = tl.constexpr(16)  # padding rows of an expert written at once: divides every TILE_ROWS


class Choices(NamedTuple):
    """What the tokens chose, and which experts lie here."""

    expert_ids_ptr: Any
    num_slots: Any
    first_expert: Any
    num_experts: Any


class Maps(NamedTuple):
    """What placing a slot writes."""

    row_of_slot_ptr: Any
    token_of_row_ptr: Any
    expert_of_tile_ptr: Any
    row_limit_of_tile_ptr: Any


class Segments(NamedTuple):
    """[BINS] each, by expert: its first row, and its number of slots."""

    first_row: Any
    count: Any


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
    choices = Choices(expert_ids_ptr, num_slots, first_expert, num_experts)
    maps = Maps(row_of_slot_ptr, token_of_row_ptr, expert_of_tile_ptr, row_limit_of_tile_ptr)
    start = tl.program_id(0) * BLOCK
    count = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, num_slots, COUNTED):
        slot = first + tl.arange(0, COUNTED)
        expert, is_local = _load_experts(choices, slot)
        count += tl.histogram(expert, BINS, mask=is_local)
        before += tl.histogram(expert, BINS, mask=is_local & (slot < start))
    segments = Segments(_first_rows(count, num_rows_ptr, num_tiles_ptr, TILE_ROWS), count)
    _place_block(choices, maps, segments, before, start, TOP_K, TILE_ROWS, BLOCK)


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
    choices = Choices(expert_ids_ptr, num_slots, first_expert, num_experts)
    start = tl.program_id(0) * chunk_slots
    count = tl.zeros([BINS], tl.int32)
    for first in range(start, min(start + chunk_slots, num_slots), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        expert, is_local = _load_experts(choices, slot)
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
    choices = Choices(expert_ids_ptr, num_slots, first_expert, num_experts)
    maps = Maps(row_of_slot_ptr, token_of_row_ptr, expert_of_tile_ptr, row_limit_of_tile_ptr)
    expert = tl.arange(0, BINS)
    is_expert = expert < num_experts
    count = tl.load(slots_before_ptr + num_chunks * num_experts + expert, mask=is_expert, other=0)
    before = tl.load(slots_before_ptr + tl.program_id(0) * num_experts + expert, mask=is_expert, other=0)
    segments = Segments(_first_rows(count, num_rows_ptr, num_tiles_ptr, TILE_ROWS), count)
    start = tl.program_id(0) * chunk_slots
    for first in range(start, min(start + chunk_slots, num_slots), BLOCK):
        before += _place_block(choices, maps, segments, before, first, TOP_K, TILE_ROWS, BLOCK)


@triton.jit
def _load_experts(choices, slot):
    """Local ids of the slots' experts, 0 where the expert is not local, and whether it is."""
    expert = tl.load(choices.expert_ids_ptr + slot, mask=slot < choices.num_slots, other=-1)
    # Compared before the subtraction, which may wrap for a garbage id.
    is_local = (expert >= choices.first_expert) & (expert < choices.first_expert + choices.num_experts)
    return tl.where(is_local, expert - choices.first_expert, 0), is_local


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
    choices,
    maps,
    segments,
    before,  # [BINS] slots of each expert before this block
    start,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write all that follows from slots [start, start + BLOCK), and return how many of them each expert has."""
    slot = start + tl.arange(0, BLOCK)
    expert, is_local = _load_experts(choices, slot)
    rank = tl.gather(before, expert, 0)
    for first in range(start, min(start + BLOCK, choices.num_slots), COMPARED):
        other_slot = first + tl.arange(0, COMPARED)
        other, is_other_local = _load_experts(choices, other_slot)
        is_earlier = is_other_local[:, None] & (other_slot[:, None] < slot[None, :])
        rank += tl.sum((is_earlier & (other[:, None] == expert[None, :])).to(tl.int32), 0)

    segment = tl.gather(segments.first_row, expert, 0)
    row = segment + rank
    tl.store(maps.row_of_slot_ptr + slot, tl.where(is_local, row, -1), mask=slot < choices.num_slots)
    tl.store(maps.token_of_row_ptr + row, slot // TOP_K, mask=is_local)

    row_limit = segment + tl.gather(segments.count, expert, 0)
    is_first_of_tile = is_local & (rank % TILE_ROWS == 0)
    tl.store(maps.expert_of_tile_ptr + row // TILE_ROWS, expert, mask=is_first_of_tile)
    tl.store(maps.row_limit_of_tile_ptr + row // TILE_ROWS, row_limit, mask=is_first_of_tile)

    is_last = is_local & (row + 1 == row_limit)
    if tl.max(is_last.to(tl.int32), 0) > 0:
        padded_limit = (row_limit + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        for first in range(0, TILE_ROWS, PADDED):
            padding = (row_limit + first)[:, None] + tl.arange(0, PADDED)[None, :]
            is_padding = is_last[:, None] & (padding < padded_limit[:, None])
            tl.store(maps.token_of_row_ptr + padding, -1, mask=is_padding)
    return tl.histogram(expert, before.shape[0], mask=is_local)
