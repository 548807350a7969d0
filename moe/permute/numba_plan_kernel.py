"""Count the slots of each expert, give each expert its first row, place each slot.

A block places the slots of one chunk, as many at once as it has bits to mark them with: each warp marks in a word of each
expert which of its lanes chose it. A slot's row is the first row of its expert, plus the expert's slots in earlier chunks and
rounds, plus those marked by earlier warps, plus those by lower lanes of its warp. Marks and counts are sums of bits and
integers, so atomics on them give the same result in every order.
"""
# numba's modules say of thread indices and shuffles only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.permute.numba_block import PlanBlock, Totals
from moe.permute.numba_count_device import Slots, build_count_slots, chunk_of_block, clear
from moe.permute.numba_place_device import (
    Bins,
    build_mark_slot,
    build_place_later_rounds,
    build_place_slot,
    build_share_of_thread,
)
from moe.permute.numba_rows_device import Maps
from moe.permute.numba_segments_device import (
    Records,
    build_begin_segments,
    build_read_counts,
    build_write_around_others,
)
from moe.runtime.numba_warp_device import gdc_launch_dependents, gdc_wait


def build_plan_kernel(*, block: PlanBlock, top_k: int, uses_pdl: bool) -> Callable[..., None]:
    """The kernel that places all slots, one chunk a block.

    Args:
        block: with Totals.CHUNK there is one chunk, of up to block.round_slots slots. Without a unit_size the last three arguments
            are left alone.
        top_k: slots of a token.
        uses_pdl: wait for the kernel before, then let the one after start. With Totals.COUNTS the kernel before has done so too.
    """
    COUNTS_SLOTS, READS_COUNTS = block.totals is Totals.SLOTS, block.totals is Totals.COUNTS
    IS_WHOLE, WRITES_UNITS, USES_PDL = block.is_whole, block.unit_size is not None, uses_pdl
    THREADS, MARKS, BINS_A_THREAD = block.num_threads, block.num_marks, block.bins_a_thread
    ROWS_OF_BINS = BINS_A_THREAD * block.rows_a_part
    TWO_RECORDS, UNIT_RECORDS = 2 * block.num_records, block.num_records if WRITES_UNITS else 1
    share_of_thread, count_slots = build_share_of_thread(block), build_count_slots(THREADS, block.num_bins)
    read_counts, begin_segments = build_read_counts(block), build_begin_segments(block)
    mark_slot, place_slot = build_mark_slot(block), build_place_slot(block, top_k)
    place_later_rounds = build_place_later_rounds(block, top_k)
    write_around_others = build_write_around_others(block)

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
        slots = Slots(expert_ids_ptr, first_expert, num_experts)
        maps = Maps(
            row_of_slot_ptr,
            token_of_row_ptr,
            expert_of_tile_ptr,
            row_limit_of_tile_ptr,
            tile_shift,
            unit_records_ptr,
            max_units,
        )
        share = share_of_thread()
        start, end = chunk_of_block(num_slots, chunk_slots)
        marks = cuda.shared.array(MARKS, np.uint32)
        numbers_of_records = cuda.shared.array(TWO_RECORDS, np.int32)
        first_units = cuda.shared.array(UNIT_RECORDS, np.int32)  # in a line of its own, by which the simulator knows it
        records = Records(numbers_of_records, first_units)
        clear(marks, MARKS, THREADS)
        if COUNTS_SLOTS:
            clear(records.numbers, TWO_RECORDS, THREADS)
        if USES_PDL and not READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        cuda.syncthreads()

        # With counts to read, the ids are there already: this kernel starts when all blocks of the one that counts have
        # waited for the ids. Only the counts are waited for.
        slot = np.uint32(start + np.uint32(cuda.threadIdx.x))
        mark = mark_slot(slots, slot, end, marks)
        if USES_PDL and READS_COUNTS:
            gdc_wait()
            gdc_launch_dependents()
        next_rows, totals = cuda.local.array(BINS_A_THREAD, np.int32), cuda.local.array(BINS_A_THREAD, np.int32)
        in_round, in_lower_parts = cuda.local.array(BINS_A_THREAD, np.int32), cuda.local.array(BINS_A_THREAD, np.int32)
        bins = Bins(next_rows, totals, in_round, in_lower_parts, cuda.local.array(ROWS_OF_BINS, np.int32))
        if COUNTS_SLOTS:
            count_slots(slots, np.uint32(0), np.uint32(num_slots), start, records.numbers)
        if READS_COUNTS:
            read_counts(counts_ptr, share, num_experts, bins)
        cuda.syncthreads()

        num_tiles, num_units = begin_segments(marks, maps, records, share, bins)
        if cuda.blockIdx.x == 0 and cuda.threadIdx.x == THREADS - 1:
            num_tiles_ptr[0] = num_tiles
            num_rows_ptr[0] = num_tiles << tile_shift
            if WRITES_UNITS:
                unit_counts_ptr[0] = num_units
                unit_counts_ptr[1] = 0
        cuda.syncthreads()
        place_slot(maps, slot, end, mark, marks)
        if not IS_WHOLE:
            write_around_others(maps, records, num_experts)
            place_later_rounds(slots, maps, start, end, marks, share, bins)

    return plan_kernel
