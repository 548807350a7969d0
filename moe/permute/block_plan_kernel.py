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
from moe.warp import (
    FULL_MASK,
    WARP_SIZE,
    device_function,
    gdc_launch_dependents,
    gdc_wait,
    load_word_of_gpu,
    warp_add,
)

NOT_LOCAL = np.int32(-1)
BATCH = 8  # loads that a thread has in flight
SHARED_BYTES = 48 * 1024 - 256  # a block, without asking for more; 128 of them for the tiles of each warp
_ONE = np.uint32(1)


class Totals(Enum):
    """Where a block learns how many slots each expert has."""

    CHUNK = "chunk"  # its chunk has all slots, and is placed in one round
    SLOTS = "slots"  # it counts all slots itself
    COUNTS = "counts"  # it sums what `count_kernel` counted of each chunk


def mark_rows(num_bins: int, num_warps: int) -> int:
    """Warps that mark at once, a power of two: all, or as many as have room in shared memory for a word of each expert."""
    num_rows = num_warps
    while 4 * num_rows * row_words(num_bins, num_rows) + 8 * num_bins > SHARED_BYTES:
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

    def count_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_chunks, num_experts] int32
        num_slots: np.int32,
        chunk_slots: np.int32,
        first_expert: np.int32,
        num_experts: np.int32,
    ) -> None:
        thread = cuda.threadIdx.x
        count = cuda.shared.array(BINS, np.int32)
        for expert in range(thread, num_experts, THREADS):
            count[expert] = 0
        if USES_PDL:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()
        start = np.int64(cuda.blockIdx.x) * chunk_slots
        end = min(start + chunk_slots, np.int64(num_slots))
        # All of them lie before `end`, so nothing is added to the second array.
        count_slots(expert_ids_ptr, start, end, end, THREADS, first_expert, num_experts, count, count)
        cuda.syncthreads()
        row = cuda.blockIdx.x * num_experts
        for expert in range(thread, num_experts, THREADS):
            counts_ptr[row + expert] = count[expert]

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
    COUNTED_BINS = num_bins if totals is Totals.SLOTS else 1
    BINS_A_THREAD = max(BINS // THREADS, 1)
    PARTS = max(THREADS // BINS, 1)  # neighbouring lanes that share an expert, and the rows of marks among them
    PART_STEPS = PARTS.bit_length() - 1
    ROWS_A_PART = ROWS // PARTS
    BIN_STEPS = WARP_SIZE.bit_length() - 1 - PART_STEPS
    NUMBERS = BINS_A_THREAD * ROWS_A_PART
    sum_counts = build_sum_counts(PARTS)

    @device_function
    def up_to_part(number: np.int32, part: np.int32) -> np.int32:
        """Sum over the parts of an expert up to this one."""
        for step in range(PART_STEPS):
            of_lower = cuda.shfl_up_sync(FULL_MASK, number, 1 << step)
            number += of_lower if part >= 1 << step else 0
        return np.int32(number)

    @device_function
    def over_parts(number: np.int32) -> np.int32:
        """Sum over the parts of an expert."""
        for step in range(PART_STEPS):
            number += cuda.shfl_xor_sync(FULL_MASK, number, 1 << step)
        return np.int32(number)

    @device_function
    def count_marks(marks: Any, bin: np.int32, part: np.int32, numbers: Any, first: int) -> np.int32:
        """To numbers[first:]: slots of an expert in earlier rows than each of this part's. Returns them of all rows."""
        total = np.int32(0)
        for row in range(ROWS_A_PART):
            numbers[first + row] = total
            total += np.int32(cuda.popc(marks[(part * np.int32(ROWS_A_PART) + np.int32(row)) * np.int32(WORDS) + bin]))
        up_to = up_to_part(total, part)
        for row in range(ROWS_A_PART):
            numbers[first + row] += up_to - total
        return over_parts(total)

    @device_function
    def sum_before_bins(number: np.int32, number_of_warp: Any) -> np.int32:
        """A number of the experts of each thread -> its sum over all experts before them. Waits for the block."""
        thread = np.int32(cuda.threadIdx.x)
        lane = thread & np.int32(WARP_SIZE - 1)
        up_to = number
        for step in range(BIN_STEPS):
            distance = PARTS << step
            of_lower = cuda.shfl_up_sync(FULL_MASK, up_to, distance)
            up_to += of_lower if lane >= distance else 0
        if lane == WARP_SIZE - 1:
            number_of_warp[thread // WARP_SIZE] = up_to
        cuda.syncthreads()
        of_lower_warps = number_of_warp[lane] if lane < thread // WARP_SIZE else np.int32(0)
        return np.int32(np.int32(warp_add(np.uint32(of_lower_warps))) + up_to - number)

    def plan_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_chunks, num_experts] int32; null unless they are read
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
        thread = np.int32(cuda.threadIdx.x)
        warp = np.int32(thread >> 5)
        part = np.int32(thread & np.int32(PARTS - 1))
        first_bin = np.int32(np.int32(thread >> PART_STEPS) * np.int32(BINS_A_THREAD))
        start = np.int64(cuda.blockIdx.x) * chunk_slots
        end = min(start + chunk_slots, np.int64(num_slots))

        marks = cuda.shared.array(MARKS, np.uint32)
        tiles_of_warp = cuda.shared.array(WARP_SIZE, np.int32)
        units_of_warp = cuda.shared.array(WARP_SIZE if WRITES_UNITS else 1, np.int32)
        before = cuda.shared.array(COUNTED_BINS, np.int32)
        after = cuda.shared.array(COUNTED_BINS, np.int32)
        clear(marks, MARKS, THREADS)
        if COUNTED_BINS == BINS:
            clear(before, COUNTED_BINS, THREADS)
            clear(after, COUNTED_BINS, THREADS)
        if USES_PDL and not READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()

        # With counts to read, the ids are there already: this kernel starts when all blocks of the one that counts have
        # waited for the ids. Only the counts are waited for.
        expert = mark_expert(expert_ids_ptr, start + thread, end, first_expert, num_experts, marks, warp, ROWS, WORDS)
        rank = rank_in_warp(marks, expert, warp, WORDS)
        if USES_PDL and READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        next_rows = cuda.local.array(BINS_A_THREAD, np.int32)  # slots in earlier chunks, then the next slot's row
        totals = cuda.local.array(BINS_A_THREAD, np.int32)
        if COUNTED_BINS == BINS:
            count_slots(expert_ids_ptr, 0, num_slots, start, THREADS, first_expert, num_experts, before, after)
        if READS_COUNTS:
            for index in range(BINS_A_THREAD):
                num_before, num_after = sum_counts(counts_ptr, first_bin + index, part, num_experts)
                next_rows[index] = over_parts(num_before)
                totals[index] = next_rows[index] + over_parts(num_after)
        cuda.syncthreads()

        numbers = cuda.local.array(NUMBERS, np.int32)
        in_round = cuda.local.array(BINS_A_THREAD, np.int32)
        num_tiles = np.int32(0)
        num_units = np.int32(0)
        for index in range(BINS_A_THREAD):
            in_round[index] = count_marks(marks, first_bin + index, part, numbers, index * ROWS_A_PART)
            if IS_WHOLE:
                next_rows[index] = 0
                totals[index] = in_round[index]
            elif COUNTED_BINS == BINS:
                next_rows[index] = before[first_bin + index]
                totals[index] = next_rows[index] + after[first_bin + index]
            num_tiles += num_tiles_of(totals[index], tile_shift)
            if WRITES_UNITS:
                num_units += num_units_of(totals[index], UNIT_ROWS)
        tile = sum_before_bins(num_tiles, tiles_of_warp)
        unit = sum_before_bins(num_units, units_of_warp) if WRITES_UNITS else np.int32(0)
        for index in range(BINS_A_THREAD):
            bin = first_bin + index
            next_rows[index] += tile << tile_shift
            for row in range(ROWS_A_PART):
                place = (part * np.int32(ROWS_A_PART) + np.int32(row)) * np.int32(WORDS) + bin
                marks[place] = np.uint32(next_rows[index] + numbers[index * ROWS_A_PART + row])
            next_rows[index] += in_round[index]
            is_own = np.uint32(bin) % np.uint32(cuda.gridDim.x) == np.uint32(cuda.blockIdx.x)
            if is_own:
                write_tiles_and_padding(
                    token_of_row_ptr,
                    expert_of_tile_ptr,
                    row_limit_of_tile_ptr,
                    bin,
                    tile,
                    totals[index],
                    part,
                    PARTS,
                    tile_shift,
                )
            if WRITES_UNITS:
                num_units = num_units_of(totals[index], UNIT_ROWS)
                if is_own:
                    write_units(
                        unit_records_ptr,
                        max_units,
                        bin,
                        tile << tile_shift,
                        totals[index],
                        unit,
                        num_units,
                        MULTIPLE,
                        GROUP,
                        part,
                        PARTS,
                    )
                unit += num_units
            tile += num_tiles_of(totals[index], tile_shift)
        if cuda.blockIdx.x == 0 and thread == THREADS - 1:
            num_tiles_ptr[0] = tile
            num_rows_ptr[0] = tile << tile_shift
            if WRITES_UNITS:
                unit_counts_ptr[0] = unit
                unit_counts_ptr[1] = 0
        cuda.syncthreads()
        if start + thread < end and warp < ROWS:
            place_slot(row_of_slot_ptr, token_of_row_ptr, start + thread, expert, rank, marks, warp, WORDS, TOP_K)

        start += ROUND
        while start < end:
            cuda.syncthreads()
            clear(marks, MARKS, THREADS)
            cuda.syncthreads()
            expert = mark_expert(
                expert_ids_ptr, start + thread, end, first_expert, num_experts, marks, warp, ROWS, WORDS
            )
            rank = rank_in_warp(marks, expert, warp, WORDS)
            cuda.syncthreads()
            for index in range(BINS_A_THREAD):
                bin = first_bin + index
                num_placed = count_marks(marks, bin, part, numbers, 0)
                for row in range(ROWS_A_PART):
                    place = (part * np.int32(ROWS_A_PART) + np.int32(row)) * np.int32(WORDS) + bin
                    marks[place] = np.uint32(next_rows[index] + numbers[row])
                next_rows[index] += num_placed
            cuda.syncthreads()
            if start + thread < end and warp < ROWS:
                place_slot(row_of_slot_ptr, token_of_row_ptr, start + thread, expert, rank, marks, warp, WORDS, TOP_K)
            start += ROUND

    return plan_kernel


@device_function
def clear(words: Any, num_words: int, num_threads: int) -> None:
    for index in range(cuda.threadIdx.x, num_words, num_threads):
        words[index] = 0


@device_function
def mark_expert(
    expert_ids_ptr: Any,
    slot: np.int64,
    end: np.int64,
    first_expert: np.int32,
    num_experts: np.int32,
    marks: Any,
    warp: np.int32,
    num_rows: int,
    row_words: int,
) -> np.int32:
    """The local expert of a slot, marked, or NOT_LOCAL."""
    expert = NOT_LOCAL
    if slot < end and warp < num_rows:
        expert = local_id(load_word_of_gpu(expert_ids_ptr, slot), first_expert, num_experts)
    if expert != NOT_LOCAL:
        lane = np.uint32(cuda.threadIdx.x & (WARP_SIZE - 1))
        cuda.atomic.or_(marks, warp * np.int32(row_words) + expert, np.uint32(_ONE << lane))
    cuda.syncwarp()
    return expert


@device_function
def rank_in_warp(marks: Any, expert: np.int32, warp: np.int32, row_words: int) -> np.int32:
    """Slots of the same expert in lower lanes."""
    rank = np.int32(0)
    if expert != NOT_LOCAL:
        rank = np.int32(
            cuda.popc(np.uint32(marks[warp * np.int32(row_words) + expert] & np.uint32(cuda.lanemask_lt())))
        )
    return rank


@device_function
def place_slot(
    row_of_slot_ptr: Any,
    token_of_row_ptr: Any,
    slot: np.int64,
    expert: np.int32,
    rank: np.int32,
    rows: Any,
    warp: np.int32,
    row_words: int,
    top_k: np.uint32,
) -> None:
    row = NOT_LOCAL
    if expert != NOT_LOCAL:
        row = np.int32(np.int32(rows[warp * np.int32(row_words) + expert]) + rank)
        token_of_row_ptr[row] = np.uint32(slot) // top_k
    row_of_slot_ptr[slot] = row


@device_function
def local_id(expert_id: np.int32, first_expert: np.int32, num_experts: np.int32) -> np.int32:
    """Number of an expert among those that lie here, or NOT_LOCAL."""
    # Compared before the subtraction, which may wrap for a garbage id.
    is_local = expert_id >= first_expert and expert_id < first_expert + num_experts
    return np.int32(expert_id - first_expert) if is_local else NOT_LOCAL


@device_function
def num_tiles_of(num_slots: np.int32, tile_shift: np.int32) -> np.int32:
    return np.int32((num_slots + (1 << tile_shift) - 1) >> tile_shift)


@device_function
def count_slots(
    expert_ids_ptr: Any,
    first: np.int64,
    end: np.int64,
    border: np.int64,
    num_threads: int,
    first_expert: np.int32,
    num_experts: np.int32,
    before: Any,
    after: Any,
) -> None:
    """Add slots [first, end) to the counts of their experts: to `before` those below `border`, to `after` the others."""
    slot = first + cuda.threadIdx.x
    experts = cuda.local.array(BATCH, np.int32)
    while slot < end:
        for index in range(BATCH):
            experts[index] = NOT_LOCAL
            if slot + index * num_threads < end:
                experts[index] = expert_ids_ptr[slot + index * num_threads]
        for index in range(BATCH):
            expert = local_id(experts[index], first_expert, num_experts)
            if expert != NOT_LOCAL:
                if slot + index * num_threads < border:
                    cuda.atomic.add(before, expert, 1)
                else:
                    cuda.atomic.add(after, expert, 1)
        slot += BATCH * num_threads


def build_sum_counts(num_parts: int) -> Any:
    """(counts_ptr, expert, part, num_experts) -> slots of an expert in every num_parts-th chunk: before this block's, and the others."""
    PARTS = num_parts
    LOADS = min(max(64 // num_parts, 4), 16)  # in flight; at once what 64 chunks hold, as far as registers reach

    @device_function
    def sum_counts(
        counts_ptr: Any, expert: np.int32, part: np.int32, num_experts: np.int32
    ) -> tuple[np.int32, np.int32]:
        this_chunk, num_chunks = np.int32(cuda.blockIdx.x), np.int32(cuda.gridDim.x)
        counts = cuda.local.array(LOADS, np.int32)
        num_before = np.int32(0)
        num_after = np.int32(0)
        chunk = part
        while chunk < num_chunks and expert < num_experts:
            for index in range(LOADS):
                counts[index] = 0
                if chunk + index * PARTS < num_chunks:
                    counts[index] = counts_ptr[(chunk + index * PARTS) * num_experts + expert]
            for index in range(LOADS):
                if chunk + index * PARTS < this_chunk:
                    num_before += counts[index]
                else:
                    num_after += counts[index]
            chunk += LOADS * PARTS
        return np.int32(num_before), np.int32(num_after)

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
    limit = (first_tile << tile_shift) + num_slots
    tile_limit = first_tile + num_tiles_of(num_slots, tile_shift)
    tile = first_tile + part
    while tile < tile_limit:
        expert_of_tile_ptr[tile] = expert
        row_limit_of_tile_ptr[tile] = limit
        tile += num_parts
    row = limit + part
    while row < tile_limit << tile_shift:
        token_of_row_ptr[row] = NOT_LOCAL
        row += num_parts


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
    num_units: np.int32,
    multiple: int,
    max_group: int,
    part: np.int32,
    num_parts: int,
) -> None:
    """Write the units of an expert, of even size and in groups of even size; its threads share the work."""
    unit = part
    while unit < num_units:
        most = np.uint32(num_units * np.int32(multiple))
        unit_rows = np.int32(np.int32(np.uint32(np.uint32(num_slots) + most - _ONE) // most) * np.int32(multiple))
        num_groups = np.uint32(np.uint32(num_units + max_group - 1) // np.uint32(max_group))
        group_units = np.uint32(np.uint32(np.uint32(num_units) + num_groups - _ONE) // num_groups)
        in_group = np.int32(np.uint32(np.uint32(unit) // group_units) * group_units)
        place = np.int64(first_unit + unit)
        records_ptr[place] = expert
        records_ptr[place + max_units] = first_row + unit * unit_rows
        records_ptr[place + 2 * max_units] = min(unit_rows, num_slots - unit * unit_rows)
        records_ptr[place + 3 * max_units] = first_unit + in_group
        records_ptr[place + 4 * max_units] = min(np.int32(group_units), num_units - in_group)
        unit += num_parts
