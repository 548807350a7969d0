"""Count the slots of each expert, give each expert its first row, place each slot.

A block places the slots of one chunk, as many at once as it has bits to mark them with: each warp marks in a word of each
expert which of its lanes chose it. A slot's row is the first row of its expert, plus the expert's slots in earlier chunks and
rounds, plus those marked by earlier warps, plus those by lower lanes of its warp. Marks and counts are sums of bits and
integers, so atomics on them give the same result in every order.
"""
# numba's modules say of thread indices and atomics only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type,call-overload"

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
from numba import cuda

from moe.flow import UnitSize
from moe.permute.chunks import NUMBA_CHUNKING
from moe.runtime.numba_warp_device import (
    FULL_MASK,
    WARP_SIZE,
    device_function,
    gdc_launch_dependents,
    gdc_wait,
    lane_in_warp,
    load_four,
    load_word_of_gpu,
    warp_add,
    warp_in_block,
)

NOT_LOCAL = np.int32(-1)
COUNTS_A_LOAD = NUMBA_CHUNKING.columns_a_load
SHARED_BYTES = 48 * 1024 - 256  # a block, without asking for more, beside the sums of each warp
_ONE = np.uint32(1)


class Totals(Enum):
    """Where a block learns how many slots each expert has."""

    CHUNK = "chunk"  # its chunk has all slots, and is placed in one round
    SLOTS = "slots"  # it counts all slots itself
    COUNTS = "counts"  # it sums what `count_kernel` counted of each chunk


def mark_rows(num_bins: int, num_warps: int) -> int:
    """Warps that mark at once, a power of two: all, or as many as have room in shared memory for a word of each expert."""
    num_rows = num_warps
    while 4 * num_rows * row_words(num_bins, num_rows) + 12 * num_bins > SHARED_BYTES:
        num_rows //= 2
    return num_rows


def row_words(num_bins: int, num_rows: int) -> int:
    """Words from a warp's marks to the next one's: so many that lanes that share an expert read from different banks."""
    return num_bins + WARP_SIZE // num_rows


def build_count_kernel(*, num_bins: int, num_warps: int, uses_pdl: bool) -> Callable[..., None]:
    """The kernel that counts the slots of each expert, one chunk a block. Arguments as in `build_plan_kernel`."""
    BINS = num_bins
    THREADS = num_warps * WARP_SIZE
    USES_PDL = uses_pdl
    count_slots = build_count_slots(THREADS, 0)

    def count_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_experts, blocks] int32: blocks beyond the last chunk write zeros
        num_slots: np.int32,
        chunk_slots: np.int32,
        first_expert: np.int32,
        num_experts: np.int32,
    ) -> None:
        thread = np.int32(cuda.threadIdx.x)
        counts = cuda.shared.array(BINS, np.int32)
        clear(counts, BINS, THREADS)
        if USES_PDL:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()
        start = np.uint32(np.uint32(cuda.blockIdx.x) * np.uint32(chunk_slots))
        end = np.uint32(min(np.uint32(start + np.uint32(chunk_slots)), np.uint32(num_slots)))
        count_slots(expert_ids_ptr, start, end, end, first_expert, num_experts, counts)
        cuda.syncthreads()
        expert = thread
        while expert < num_experts:
            place = np.int32(expert * np.int32(cuda.gridDim.x) + np.int32(cuda.blockIdx.x))
            counts_ptr[place] = counts[np.uint32(expert)]
            expert = np.int32(expert + THREADS)

    return count_kernel


def build_plan_kernel(
    *, num_bins: int, num_warps: int, top_k: int, totals: Totals, uses_pdl: bool, unit_size: UnitSize | None = None
) -> Callable[..., None]:
    """The kernel that places all slots, one chunk a block.

    Args:
        num_bins: a power of two, at least 32 and the number of experts.
        num_warps: warps of a block, a power of two.
        top_k: slots of a token.
        totals: with Totals.CHUNK there is one chunk, of up to 32 * mark_rows(...) slots.
        uses_pdl: wait for the kernel before, then let the one after start. With Totals.COUNTS the kernel before has done so too.
        unit_size: also cut each expert's rows into such units; None: leave the last three arguments alone.
    """
    BINS = num_bins
    THREADS = num_warps * WARP_SIZE
    USES_PDL = uses_pdl
    WRITES_UNITS = unit_size is not None
    UNIT_ROWS, MULTIPLE, GROUP = (
        (unit_size.max_rows, unit_size.multiple, unit_size.max_group) if unit_size else (1, 1, 1)
    )
    ROWS = mark_rows(num_bins, num_warps)
    WORDS = row_words(num_bins, ROWS)
    MARKS = ROWS * WORDS
    ROUND = ROWS * WARP_SIZE
    TOP_K = np.uint32(top_k)
    IS_WHOLE = totals is Totals.CHUNK
    READS_COUNTS = totals is Totals.COUNTS
    COUNTS_SLOTS = totals is Totals.SLOTS
    BINS_A_THREAD = max(BINS // THREADS, 1)
    PARTS = max(THREADS // BINS, 1)  # neighbouring lanes that share an expert, and the rows of marks among them
    PART_STEPS = PARTS.bit_length() - 1
    ROWS_A_PART = ROWS // PARTS
    BIN_STEPS = WARP_SIZE.bit_length() - 1 - PART_STEPS
    NUMBERS = BINS_A_THREAD * ROWS_A_PART
    # One block has all experts' rows to write around, and many blocks a few each.
    WRITERS = PARTS if IS_WHOLE else WARP_SIZE // 2
    RECORDS = 1 if IS_WHOLE else BINS
    TWO_RECORDS = 2 * RECORDS
    UNIT_RECORDS = RECORDS if WRITES_UNITS else 1
    sum_counts = build_sum_counts(PARTS)
    count_slots = build_count_slots(THREADS, BINS)

    @device_function
    def before_part(number: np.int32, part: np.int32) -> np.int32:
        """Sum over the lower parts of an expert."""
        up_to = number
        for step in range(PART_STEPS):
            of_lower = cuda.shfl_up_sync(FULL_MASK, up_to, 1 << step)
            up_to += of_lower if part >= 1 << step else 0
        return np.int32(up_to - number)

    @device_function
    def over_parts(number: np.int32) -> np.int32:
        """Sum over the parts of an expert."""
        for step in range(PART_STEPS):
            number += cuda.shfl_xor_sync(FULL_MASK, number, 1 << step)
        return np.int32(number)

    @device_function
    def count_marks(marks: Any, first_word: np.uint32, numbers: Any, first: int) -> np.int32:
        """To numbers[first:]: slots of an expert in earlier rows of this part than each. Returns them of all its rows."""
        total = np.int32(0)
        for row in range(ROWS_A_PART):
            numbers[first + row] = total
            total += np.int32(cuda.popc(marks[np.uint32(first_word + np.uint32(row * WORDS))]))
        return total

    @device_function
    def replace_marks(marks: Any, first_word: np.uint32, numbers: Any, first: int, next_row: np.int32) -> None:
        """By the row that the first slot marked in each word goes to."""
        for row in range(ROWS_A_PART):
            marks[np.uint32(first_word + np.uint32(row * WORDS))] = np.uint32(next_row + numbers[first + row])

    @device_function
    def sum_in_warp(number: np.int32) -> np.int32:
        """A number of the experts of each thread -> its sum over those of this warp up to this thread's."""
        lane = lane_in_warp()
        for step in range(BIN_STEPS):
            distance = PARTS << step
            of_lower = cuda.shfl_up_sync(FULL_MASK, number, distance)
            number += of_lower if lane >= distance else 0
        return np.int32(number)

    @device_function
    def sum_of_lower_warps(number_of_warp: Any) -> np.int32:
        lane = lane_in_warp()
        of_lower = np.int32(0)
        if lane < warp_in_block():
            of_lower = number_of_warp[np.uint32(lane)]
        return np.int32(warp_add(np.uint32(of_lower)))

    @device_function
    def write_around(
        maps: Any,
        tile_shift: np.int32,
        max_units: np.int32,
        expert: np.int32,
        first_tile: np.int32,
        num_slots: np.int32,
        first_unit: np.int32,
        writer: np.int32,
    ) -> None:
        """A writer's share of what is known of an expert's rows without its slots."""
        write_tiles_and_padding(maps[0], maps[1], maps[2], expert, first_tile, num_slots, writer, WRITERS, tile_shift)
        if WRITES_UNITS:
            first_row = np.int32(first_tile << tile_shift)
            write_units(
                maps[3],
                max_units,
                expert,
                first_row,
                num_slots,
                first_unit,
                writer,
                WRITERS,
                UNIT_ROWS,
                MULTIPLE,
                GROUP,
            )

    def plan_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_experts, num_chunks made up to a multiple of 4] int32; null unless they are read
        row_of_slot_ptr: Any,  # [T, K] int32
        token_of_row_ptr: Any,  # [P] int32
        expert_of_tile_ptr: Any,  # [P / tile_rows] int32
        row_limit_of_tile_ptr: Any,  # [P / tile_rows] int32
        num_rows_ptr: Any,  # [1] int32
        num_tiles_ptr: Any,  # [1] int32
        num_slots: np.int32,
        chunk_slots: np.int32,
        first_expert: np.int32,
        num_experts: np.int32,
        tile_shift: np.int32,  # tile_rows = 1 << tile_shift
        unit_records_ptr: Any,  # [5, max_units] int32, as moe.flow.RowUnits
        unit_counts_ptr: Any,  # [2] int32
        max_units: np.int32,
    ) -> None:
        thread = np.uint32(cuda.threadIdx.x)
        warp = np.uint32(thread >> np.uint32(5))
        part = np.int32(thread & np.uint32(PARTS - 1))
        first_bin = np.int32(np.uint32(thread >> np.uint32(PART_STEPS)) * np.uint32(BINS_A_THREAD))
        first_word = np.uint32(np.uint32(part) * np.uint32(ROWS_A_PART * WORDS) + np.uint32(first_bin))
        start = np.uint32(np.uint32(cuda.blockIdx.x) * np.uint32(chunk_slots))
        end = np.uint32(min(np.uint32(start + np.uint32(chunk_slots)), np.uint32(num_slots)))

        maps = (token_of_row_ptr, expert_of_tile_ptr, row_limit_of_tile_ptr, unit_records_ptr)
        marks = cuda.shared.array(MARKS, np.uint32)
        tiles_of_warp = cuda.shared.array(WARP_SIZE, np.int32)
        units_of_warp = cuda.shared.array(WARP_SIZE if WRITES_UNITS else 1, np.int32)
        # Of each expert, and BINS further on: slots in earlier chunks and the others; later, first tile and all slots.
        counts = cuda.shared.array(TWO_RECORDS, np.int32)
        first_units = cuda.shared.array(UNIT_RECORDS, np.int32)
        clear(marks, MARKS, THREADS)
        if COUNTS_SLOTS:
            clear(counts, TWO_RECORDS, THREADS)
        if USES_PDL and not READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()

        # With counts to read, the ids are there already: this kernel starts when all blocks of the one that counts have
        # waited for the ids. Only the counts are waited for.
        slot = np.uint32(start + thread)
        word = mark_slot(expert_ids_ptr, slot, end, first_expert, num_experts, marks, warp, ROWS, WORDS)
        rank = rank_in_warp(marks, word)
        if USES_PDL and READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        next_rows = cuda.local.array(BINS_A_THREAD, np.int32)  # slots in earlier chunks, then the next slot's row
        totals = cuda.local.array(BINS_A_THREAD, np.int32)
        if COUNTS_SLOTS:
            count_slots(expert_ids_ptr, np.uint32(0), np.uint32(num_slots), start, first_expert, num_experts, counts)
        if READS_COUNTS:
            for index in range(BINS_A_THREAD):
                num_before, num_in_all = sum_counts(counts_ptr, first_bin + index, part, num_experts)
                next_rows[index] = over_parts(num_before)
                totals[index] = over_parts(num_in_all)
        cuda.syncthreads()

        numbers = cuda.local.array(NUMBERS, np.int32)
        in_round = cuda.local.array(BINS_A_THREAD, np.int32)
        in_lower_parts = cuda.local.array(BINS_A_THREAD, np.int32)
        num_tiles = np.int32(0)
        num_units = np.int32(0)
        for index in range(BINS_A_THREAD):
            bin = np.uint32(np.uint32(first_bin) + np.uint32(index))
            in_part = count_marks(marks, np.uint32(first_word + np.uint32(index)), numbers, index * ROWS_A_PART)
            in_lower_parts[index] = before_part(in_part, part)
            in_round[index] = over_parts(in_part)
            if IS_WHOLE:
                next_rows[index] = 0
                totals[index] = in_round[index]
            if COUNTS_SLOTS:
                next_rows[index] = counts[bin]
                totals[index] = next_rows[index] + counts[np.uint32(bin + np.uint32(BINS))]
            num_tiles += num_tiles_of(totals[index], tile_shift)
            if WRITES_UNITS:
                num_units += num_units_of(totals[index], UNIT_ROWS)
        tiles_up_to = sum_in_warp(num_tiles)
        units_up_to = sum_in_warp(num_units) if WRITES_UNITS else np.int32(0)
        if thread & np.uint32(WARP_SIZE - 1) == WARP_SIZE - 1:
            tiles_of_warp[warp] = tiles_up_to
            if WRITES_UNITS:
                units_of_warp[warp] = units_up_to
        cuda.syncthreads()
        tile = np.int32(sum_of_lower_warps(tiles_of_warp) + tiles_up_to - num_tiles)
        unit = np.int32(0)
        if WRITES_UNITS:
            unit = np.int32(sum_of_lower_warps(units_of_warp) + units_up_to - num_units)
        for index in range(BINS_A_THREAD):
            bin = np.uint32(np.uint32(first_bin) + np.uint32(index))
            next_rows[index] += tile << tile_shift
            word_of_bin = np.uint32(first_word + np.uint32(index))
            first_row = np.int32(next_rows[index] + in_lower_parts[index])
            replace_marks(marks, word_of_bin, numbers, index * ROWS_A_PART, first_row)
            next_rows[index] += in_round[index]
            if IS_WHOLE:
                write_around(maps, tile_shift, max_units, np.int32(bin), tile, totals[index], unit, part)
            elif part == 0:
                counts[bin] = tile
                counts[np.uint32(bin + np.uint32(BINS))] = totals[index]
                if WRITES_UNITS:
                    first_units[bin] = unit
            tile += num_tiles_of(totals[index], tile_shift)
            if WRITES_UNITS:
                unit += num_units_of(totals[index], UNIT_ROWS)
        if cuda.blockIdx.x == 0 and thread == THREADS - 1:
            num_tiles_ptr[0] = tile
            num_rows_ptr[0] = tile << tile_shift
            if WRITES_UNITS:
                unit_counts_ptr[0] = unit
                unit_counts_ptr[1] = 0
        cuda.syncthreads()
        if slot < end and warp < ROWS:
            place_slot(row_of_slot_ptr, token_of_row_ptr, slot, word, rank, marks, TOP_K)

        if not IS_WHOLE:
            # The blocks share the experts among them, and so many threads of a block write what each needs.
            num_blocks = np.int32(cuda.gridDim.x)
            expert = np.int32(np.int32(thread // np.uint32(WRITERS)) * num_blocks + np.int32(cuda.blockIdx.x))
            writer = np.int32(thread & np.uint32(WRITERS - 1))
            while expert < num_experts:
                first_tile = counts[np.uint32(expert)]
                total = counts[np.uint32(np.uint32(expert) + np.uint32(BINS))]
                first_unit = first_units[np.uint32(expert)] if WRITES_UNITS else np.int32(0)
                write_around(maps, tile_shift, max_units, expert, first_tile, total, first_unit, writer)
                expert = np.int32(expert + np.int32(THREADS // WRITERS) * num_blocks)

            start = np.uint32(start + np.uint32(ROUND))
            while start < end:
                cuda.syncthreads()
                clear(marks, MARKS, THREADS)
                cuda.syncthreads()
                slot = np.uint32(start + thread)
                word = mark_slot(expert_ids_ptr, slot, end, first_expert, num_experts, marks, warp, ROWS, WORDS)
                rank = rank_in_warp(marks, word)
                cuda.syncthreads()
                for index in range(BINS_A_THREAD):
                    word_of_bin = np.uint32(first_word + np.uint32(index))
                    in_part = count_marks(marks, word_of_bin, numbers, 0)
                    first_row = np.int32(next_rows[index] + before_part(in_part, part))
                    replace_marks(marks, word_of_bin, numbers, 0, first_row)
                    next_rows[index] += over_parts(in_part)
                cuda.syncthreads()
                if slot < end and warp < ROWS:
                    place_slot(row_of_slot_ptr, token_of_row_ptr, slot, word, rank, marks, TOP_K)
                start = np.uint32(start + np.uint32(ROUND))

    return plan_kernel


@device_function
def clear(words: Any, num_words: int, num_threads: int) -> None:
    thread = np.uint32(cuda.threadIdx.x)
    for turn in range(num_words // num_threads):
        words[np.uint32(thread + np.uint32(turn * num_threads))] = 0
    last = np.uint32(thread + np.uint32(num_words // num_threads * num_threads))
    if last < np.uint32(num_words):
        words[last] = 0


@device_function
def mark_slot(
    expert_ids_ptr: Any,
    slot: np.uint32,
    end: np.uint32,
    first_expert: np.int32,
    num_experts: np.int32,
    marks: Any,
    warp: np.uint32,
    num_rows: int,
    row_words: int,
) -> np.int32:
    """In which word of marks a slot set the bit of its lane, or NOT_LOCAL."""
    expert = NOT_LOCAL
    if slot < end and warp < np.uint32(num_rows):
        expert = local_id(load_word_of_gpu(expert_ids_ptr, np.int64(slot)), first_expert, num_experts)
    word = NOT_LOCAL
    if expert != NOT_LOCAL:
        word = np.int32(np.int32(warp) * np.int32(row_words) + expert)
        cuda.atomic.or_(marks, np.uint32(word), np.uint32(_ONE << np.uint32(lane_in_warp())))
    cuda.syncwarp()
    return word


@device_function
def rank_in_warp(marks: Any, word: np.int32) -> np.int32:
    """Slots of the same expert in lower lanes."""
    rank = np.int32(0)
    if word != NOT_LOCAL:
        rank = np.int32(cuda.popc(np.uint32(marks[np.uint32(word)] & np.uint32(cuda.lanemask_lt()))))
    return rank


@device_function
def place_slot(
    row_of_slot_ptr: Any,
    token_of_row_ptr: Any,
    slot: np.uint32,
    word: np.int32,
    rank: np.int32,
    rows: Any,
    top_k: np.uint32,
) -> None:
    row = NOT_LOCAL
    if word != NOT_LOCAL:
        row = np.int32(np.int32(rows[np.uint32(word)]) + rank)
        token_of_row_ptr[row] = np.uint32(slot) // top_k
    row_of_slot_ptr[slot] = row


@device_function
def local_id(expert_id: np.int32, first_expert: np.int32, num_experts: np.int32) -> np.int32:
    """Number of an expert among those that lie here, or NOT_LOCAL."""
    number = np.uint32(np.uint32(expert_id) - np.uint32(first_expert))  # wraps: a lower id becomes a large one
    return np.int32(number) if number < np.uint32(num_experts) else NOT_LOCAL


@device_function
def num_tiles_of(num_slots: np.int32, tile_shift: np.int32) -> np.int32:
    most_added = np.int32(np.int32(np.int32(1) << tile_shift) - np.int32(1))
    return np.int32(np.int32(num_slots + most_added) >> tile_shift)


def build_count_slots(num_threads: int, num_bins: int) -> Any:
    """(expert_ids_ptr, first, end, border, first_expert, num_experts, counts): count slots [first, end) of each expert.

    Those from `border` on are added to counts[num_bins:].
    """
    THREADS = num_threads
    count_eight, count_four = _build_count_batch(8, num_threads, num_bins), _build_count_batch(4, num_threads, num_bins)
    count_two, count_one = _build_count_batch(2, num_threads, num_bins), _build_count_batch(1, num_threads, num_bins)

    @device_function
    def count_slots(
        expert_ids_ptr: Any,
        first: np.uint32,
        end: np.uint32,
        border: np.uint32,
        first_expert: np.int32,
        num_experts: np.int32,
        counts: Any,
    ) -> None:
        slot = np.uint32(first + np.uint32(cuda.threadIdx.x))
        while np.uint32(slot + np.uint32(7 * THREADS)) < end:
            count_eight(expert_ids_ptr, slot, border, first_expert, num_experts, counts)
            slot = np.uint32(slot + np.uint32(8 * THREADS))
        if np.uint32(slot + np.uint32(3 * THREADS)) < end:
            count_four(expert_ids_ptr, slot, border, first_expert, num_experts, counts)
            slot = np.uint32(slot + np.uint32(4 * THREADS))
        if np.uint32(slot + np.uint32(THREADS)) < end:
            count_two(expert_ids_ptr, slot, border, first_expert, num_experts, counts)
            slot = np.uint32(slot + np.uint32(2 * THREADS))
        if slot < end:
            count_one(expert_ids_ptr, slot, border, first_expert, num_experts, counts)

    return count_slots


def _build_count_batch(size: int, num_threads: int, num_bins: int) -> Any:
    """Count a slot and each num_threads-th after it, `size` in all, whose ids are loaded together."""
    SIZE = size
    THREADS = num_threads
    SECOND = np.uint32(num_bins)

    @device_function
    def count_batch(
        expert_ids_ptr: Any,
        slot: np.uint32,
        border: np.uint32,
        first_expert: np.int32,
        num_experts: np.int32,
        counts: Any,
    ) -> None:
        ids = cuda.local.array(SIZE, np.int32)
        for index in range(SIZE):
            ids[index] = expert_ids_ptr[np.uint32(slot + np.uint32(index * THREADS))]
        for index in range(SIZE):
            expert = local_id(ids[index], first_expert, num_experts)
            if expert != NOT_LOCAL:
                place = np.uint32(expert)
                if np.uint32(slot + np.uint32(index * THREADS)) >= border:
                    place = np.uint32(place + SECOND)
                cuda.atomic.add(counts, place, 1)

    return count_batch


def build_sum_counts(num_parts: int) -> Any:
    """(counts_ptr, expert, part, num_experts) -> slots of an expert in every num_parts-th four chunks: before this block's, and in all."""
    PARTS = num_parts
    LOADS = 4  # in flight
    WIDTH = COUNTS_A_LOAD
    COUNTS = LOADS * WIDTH

    @device_function
    def sum_counts(
        counts_ptr: Any, expert: np.int32, part: np.int32, num_experts: np.int32
    ) -> tuple[np.int32, np.int32]:
        num_loads = np.uint32(np.uint32(np.uint32(cuda.gridDim.x) + np.uint32(WIDTH - 1)) // np.uint32(WIDTH))
        counts = cuda.local.array(COUNTS, np.int32)
        num_before = np.int32(0)
        num_in_all = np.int32(0)
        load = np.uint32(part)
        while load < num_loads and np.int32(expert) < num_experts:
            place = np.uint32(np.uint32(np.uint32(expert) * num_loads + load) * np.uint32(WIDTH))
            for index in range(LOADS):
                for word in range(WIDTH):
                    counts[index * WIDTH + word] = 0
                if np.uint32(load + np.uint32(index * PARTS)) < num_loads:
                    a, b, c, d = load_four(counts_ptr, np.int64(place) + index * PARTS * WIDTH)
                    counts[index * WIDTH] = a
                    counts[index * WIDTH + 1] = b
                    counts[index * WIDTH + 2] = c
                    counts[index * WIDTH + 3] = d
            chunks_before = np.int32(np.int32(cuda.blockIdx.x) - np.int32(load) * np.int32(WIDTH))
            for index in range(LOADS):
                for word in range(WIDTH):
                    num_in_all += counts[index * WIDTH + word]
                    if np.int32(index * PARTS * WIDTH + word) < chunks_before:
                        num_before += counts[index * WIDTH + word]
            load = np.uint32(load + np.uint32(LOADS * PARTS))
        return np.int32(num_before), np.int32(num_in_all)

    return sum_counts


@device_function
def write_tiles_and_padding(
    token_of_row_ptr: Any,
    expert_of_tile_ptr: Any,
    row_limit_of_tile_ptr: Any,
    expert: np.int32,
    first_tile: np.int32,
    num_slots: np.int32,
    part: np.int32,
    num_parts: int,
    tile_shift: np.int32,
) -> None:
    """Write what is known of an expert's rows before its slots are placed; its threads share the work."""
    limit = np.int32((first_tile << tile_shift) + num_slots)
    tile_limit = np.int32(first_tile + num_tiles_of(num_slots, tile_shift))
    row_limit = np.int32(tile_limit << tile_shift)
    tile = np.int32(first_tile + part)
    while tile < tile_limit:
        expert_of_tile_ptr[tile] = expert
        row_limit_of_tile_ptr[tile] = limit
        tile = np.int32(tile + np.int32(num_parts))
    row = np.int32(limit + part)
    while row < row_limit:
        token_of_row_ptr[row] = NOT_LOCAL
        row = np.int32(row + np.int32(num_parts))


@device_function
def num_units_of(num_slots: np.int32, max_rows: int) -> np.int32:
    return np.int32(np.uint32(num_slots + max_rows - 1) // np.uint32(max_rows))


@device_function
def write_units(
    records_ptr: Any,
    max_units: np.int32,
    expert: np.int32,
    first_row: np.int32,
    num_slots: np.int32,
    first_unit: np.int32,
    part: np.int32,
    num_parts: int,
    max_rows: int,
    multiple: int,
    max_group: int,
) -> None:
    """Write the units of an expert, of even size and in groups of even size; its threads share the work."""
    num_units = num_units_of(num_slots, max_rows)
    most = np.uint32(np.uint32(num_units) * np.uint32(multiple))
    num_groups = np.uint32(np.uint32(np.uint32(num_units) + np.uint32(max_group - 1)) // np.uint32(max_group))
    unit = part
    while unit < num_units:
        unit_rows = np.int32(np.uint32(np.uint32(np.uint32(num_slots) + most - _ONE) // most) * np.uint32(multiple))
        group_units = np.uint32(np.uint32(np.uint32(num_units) + num_groups - _ONE) // num_groups)
        in_group = np.int32(np.uint32(np.uint32(unit) // group_units) * group_units)
        start = np.int32(unit * unit_rows)
        place = np.int64(first_unit + unit)
        records_ptr[place] = expert
        records_ptr[place + max_units] = np.int32(first_row + start)
        records_ptr[place + 2 * max_units] = min(unit_rows, np.int32(num_slots - start))
        records_ptr[place + 3 * max_units] = np.int32(first_unit + in_group)
        records_ptr[place + 4 * max_units] = min(np.int32(group_units), np.int32(num_units - in_group))
        unit = np.int32(unit + np.int32(num_parts))
