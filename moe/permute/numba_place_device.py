"""Device functions: mark which slots of a round chose which expert, count the marks, place the slots by them."""
# numba's modules say of thread indices, shuffles and atomics only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type,call-overload"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from moe.permute.numba_block import PlanBlock
from moe.permute.numba_count_device import NOT_LOCAL, Slots, clear, local_id
from moe.permute.numba_rows_device import Maps
from moe.runtime.numba_warp_device import (
    FULL_MASK,
    device_function,
    lane_in_warp,
    load_word_of_gpu,
)

_ONE = np.uint32(1)


class Mark(NamedTuple):
    """Where a slot is marked, and how many slots of its expert lower lanes have."""

    word: np.int32  # of the marks, or NOT_LOCAL
    rank: np.int32


class Share(NamedTuple):
    """Which marks a thread counts: of which experts, in which rows."""

    part: np.int32
    first_bin: np.int32
    first_word: np.uint32


class Bins(NamedTuple):
    """What a thread knows of each of its experts, in local memory."""

    next_rows: Any  # slots in earlier chunks, then the next slot's row
    totals: Any  # slots in all
    in_round: Any  # slots in the present round
    in_lower_parts: Any  # of those, in the parts of lower lanes
    in_lower_rows: Any  # of those, of each expert and each row of this part, in lower rows of it


def build_share_of_thread(block: PlanBlock) -> Any:
    """() -> Share"""
    BINS_A_THREAD, PARTS, PART_STEPS = block.bins_a_thread, block.num_parts, block.part_steps
    PART_WORDS = block.rows_a_part * block.row_words

    @device_function
    def share_of_thread() -> Share:
        thread = np.uint32(cuda.threadIdx.x)
        part = np.int32(thread & np.uint32(PARTS - 1))
        first_bin = np.int32(np.uint32(thread >> np.uint32(PART_STEPS)) * np.uint32(BINS_A_THREAD))
        first_word = np.uint32(np.uint32(part) * np.uint32(PART_WORDS) + np.uint32(first_bin))
        return Share(part, first_bin, first_word)

    return share_of_thread


def build_mark_slot(block: PlanBlock) -> Any:
    """(slots, slot, end, marks) -> Mark: set the bit of this lane in the word of the slot's expert."""
    ROWS, WORDS = block.mark_rows, block.row_words

    @device_function
    def mark_slot(slots: Slots, slot: np.uint32, end: np.uint32, marks: Any) -> Mark:
        warp = np.uint32(np.uint32(cuda.threadIdx.x) >> np.uint32(5))
        expert = NOT_LOCAL
        if slot < end and warp < np.uint32(ROWS):
            expert = local_id(load_word_of_gpu(slots.expert_ids_ptr, np.int64(slot)), slots)
        word = NOT_LOCAL
        if expert != NOT_LOCAL:
            word = np.int32(np.int32(warp) * np.int32(WORDS) + expert)
            cuda.atomic.or_(marks, np.uint32(word), np.uint32(_ONE << np.uint32(lane_in_warp())))
        cuda.syncwarp()
        rank = np.int32(0)
        if word != NOT_LOCAL:
            rank = np.int32(cuda.popc(np.uint32(marks[np.uint32(word)] & np.uint32(cuda.lanemask_lt()))))
        return Mark(word, rank)

    return mark_slot


def build_over_parts(block: PlanBlock) -> Any:
    """(number) -> its sum over the parts of an expert."""
    PART_STEPS = block.part_steps

    @device_function
    def over_parts(number: np.int32) -> np.int32:
        for step in range(PART_STEPS):
            number += cuda.shfl_xor_sync(FULL_MASK, number, 1 << step)
        return np.int32(number)

    return over_parts


def build_count_marks(block: PlanBlock) -> Any:
    """(marks, share, bins, index): count the slots of the round that chose a thread's expert."""
    ROWS_A_PART, WORDS, PART_STEPS = block.rows_a_part, block.row_words, block.part_steps
    over_parts = build_over_parts(block)

    @device_function
    def before_part(number: np.int32, part: np.int32) -> np.int32:
        """Sum over the lower parts of an expert."""
        up_to = number
        for step in range(PART_STEPS):
            of_lower = cuda.shfl_up_sync(FULL_MASK, up_to, 1 << step)
            up_to += of_lower if part >= 1 << step else 0
        return np.int32(up_to - number)

    @device_function
    def count_marks(marks: Any, share: Share, bins: Bins, index: int) -> None:
        first_word = np.uint32(share.first_word + np.uint32(index))
        in_part = np.int32(0)
        for row in range(ROWS_A_PART):
            bins.in_lower_rows[index * ROWS_A_PART + row] = in_part
            in_part += np.int32(cuda.popc(marks[np.uint32(first_word + np.uint32(row * WORDS))]))
        bins.in_lower_parts[index] = before_part(in_part, share.part)
        bins.in_round[index] = over_parts(in_part)

    return count_marks


def build_give_rows(block: PlanBlock) -> Any:
    """(marks, share, bins, index): replace the marks of a thread's expert, word by word, by the row that the first slot goes to."""
    ROWS_A_PART, WORDS = block.rows_a_part, block.row_words

    @device_function
    def give_rows(marks: Any, share: Share, bins: Bins, index: int) -> None:
        first_word = np.uint32(share.first_word + np.uint32(index))
        first_row = np.int32(bins.next_rows[index] + bins.in_lower_parts[index])
        for row in range(ROWS_A_PART):
            row_of_first = np.uint32(first_row + bins.in_lower_rows[index * ROWS_A_PART + row])
            marks[np.uint32(first_word + np.uint32(row * WORDS))] = row_of_first
        bins.next_rows[index] += bins.in_round[index]

    return give_rows


def build_place_slot(block: PlanBlock, top_k: int) -> Any:
    """(maps, slot, end, mark, rows): write the slot's row, and the row's token. `rows` are what became of the marks."""
    ROWS = block.mark_rows
    TOP_K = np.uint32(top_k)

    @device_function
    def place_slot(maps: Maps, slot: np.uint32, end: np.uint32, mark: Mark, rows: Any) -> None:
        warp = np.uint32(np.uint32(cuda.threadIdx.x) >> np.uint32(5))
        if slot < end and warp < ROWS:
            row = NOT_LOCAL
            if mark.word != NOT_LOCAL:
                row = np.int32(np.int32(rows[np.uint32(mark.word)]) + mark.rank)
                maps.token_of_row_ptr[row] = np.uint32(slot) // TOP_K
            maps.row_of_slot_ptr[slot] = row

    return place_slot


def build_place_later_rounds(block: PlanBlock, top_k: int) -> Any:
    """(slots, maps, start, end, marks, share, bins): place the slots of a chunk that are left after the round from `start` on."""
    MARKS, THREADS, ROUND, BINS_A_THREAD = block.num_marks, block.num_threads, block.round_slots, block.bins_a_thread
    mark_slot, count_marks = build_mark_slot(block), build_count_marks(block)
    give_rows, place_slot = build_give_rows(block), build_place_slot(block, top_k)

    @device_function
    def place_later_rounds(
        slots: Slots, maps: Maps, start: np.uint32, end: np.uint32, marks: Any, share: Share, bins: Bins
    ) -> None:
        start = np.uint32(start + np.uint32(ROUND))
        while start < end:
            cuda.syncthreads()
            clear(marks, MARKS, THREADS)
            cuda.syncthreads()
            slot = np.uint32(start + np.uint32(cuda.threadIdx.x))
            mark = mark_slot(slots, slot, end, marks)
            cuda.syncthreads()
            for index in range(BINS_A_THREAD):
                count_marks(marks, share, bins, index)
                give_rows(marks, share, bins, index)
            cuda.syncthreads()
            place_slot(maps, slot, end, mark, marks)
            start = np.uint32(start + np.uint32(ROUND))

    return place_later_rounds
