"""Device functions: how many slots each expert has, and so where its segment of rows begins."""
# numba's modules say of thread indices and shuffles only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from moe.permute.numba_block import PlanBlock, Totals
from moe.permute.numba_count_device import build_sum_counts
from moe.permute.numba_place_device import Bins, Share, build_count_marks, build_give_rows, build_over_parts
from moe.permute.numba_rows_device import Maps, Segment, build_write_around, num_tiles_of, num_units_of
from moe.runtime.numba_warp_device import FULL_MASK, WARP_SIZE, device_function, lane_in_warp, warp_add, warp_in_block


class Records(NamedTuple):
    """Of each expert, in shared memory."""

    numbers: Any  # slots in earlier chunks, and BINS further on the others; later, first tile and all slots
    first_units: Any


def build_read_counts(block: PlanBlock) -> Any:
    """(counts_ptr, share, num_experts, bins): slots of a thread's experts in earlier chunks, and in all."""
    BINS_A_THREAD = block.bins_a_thread
    sum_counts, over_parts = build_sum_counts(block.num_parts), build_over_parts(block)

    @device_function
    def read_counts(counts_ptr: Any, share: Share, num_experts: np.int32, bins: Bins) -> None:
        for index in range(BINS_A_THREAD):
            num_before, num_in_all = sum_counts(counts_ptr, share.first_bin + index, share.part, num_experts)
            bins.next_rows[index] = over_parts(num_before)
            bins.totals[index] = over_parts(num_in_all)

    return read_counts


def build_begin_segments(block: PlanBlock) -> Any:
    """(marks, maps, records, share, bins) -> tiles and units up to the end of this thread's experts.

    Counts the marks of the first round, and gives them rows. The only block writes around its experts' slots; others leave the
    segments in `records`.
    """
    IS_WHOLE, COUNTS_SLOTS = block.is_whole, block.totals is Totals.SLOTS
    WRITES_UNITS, UNIT_ROWS = block.unit_size is not None, block.unit_size.max_rows if block.unit_size else 1
    BINS, BINS_A_THREAD = block.num_bins, block.bins_a_thread
    first_of_thread, write_around = _build_first_of_thread(block), build_write_around(block)
    count_marks, give_rows = build_count_marks(block), build_give_rows(block)

    @device_function
    def begin_segments(marks: Any, maps: Maps, records: Records, share: Share, bins: Bins) -> tuple[np.int32, np.int32]:
        num_tiles = np.int32(0)
        num_units = np.int32(0)
        for index in range(BINS_A_THREAD):
            bin = np.uint32(np.uint32(share.first_bin) + np.uint32(index))
            count_marks(marks, share, bins, index)
            if IS_WHOLE:
                bins.next_rows[index] = 0
                bins.totals[index] = bins.in_round[index]
            if COUNTS_SLOTS:
                bins.next_rows[index] = records.numbers[bin]
                bins.totals[index] = bins.next_rows[index] + records.numbers[np.uint32(bin + np.uint32(BINS))]
            num_tiles += num_tiles_of(bins.totals[index], maps.tile_shift)
            if WRITES_UNITS:
                num_units += num_units_of(bins.totals[index], UNIT_ROWS)
        first_tile, first_unit = first_of_thread(num_tiles, num_units)
        tile, unit = np.int64(first_tile), np.int64(first_unit)
        for index in range(BINS_A_THREAD):
            bin = np.uint32(np.uint32(share.first_bin) + np.uint32(index))
            num_slots = bins.totals[index]
            bins.next_rows[index] += tile << maps.tile_shift
            give_rows(marks, share, bins, index)
            if IS_WHOLE:
                write_around(maps, Segment(np.int32(bin), tile, num_slots, unit), share.part)
            elif share.part == 0:
                records.numbers[bin] = tile
                records.numbers[np.uint32(bin + np.uint32(BINS))] = num_slots
                if WRITES_UNITS:
                    records.first_units[bin] = unit
            tile += num_tiles_of(num_slots, maps.tile_shift)
            if WRITES_UNITS:
                unit += num_units_of(num_slots, UNIT_ROWS)
        return tile, unit

    return begin_segments


def build_write_around_others(block: PlanBlock) -> Any:
    """(maps, records, num_experts): write around all experts, which the blocks share among them, with several writers each."""
    BINS, THREADS, WRITERS = block.num_bins, block.num_threads, block.num_writers
    WRITES_UNITS = block.unit_size is not None
    write_around = build_write_around(block)

    @device_function
    def write_around_others(maps: Maps, records: Records, num_experts: np.int32) -> None:
        thread = np.uint32(cuda.threadIdx.x)
        num_blocks = np.int32(cuda.gridDim.x)
        expert = np.int32(np.int32(thread // np.uint32(WRITERS)) * num_blocks + np.int32(cuda.blockIdx.x))
        writer = np.int32(thread & np.uint32(WRITERS - 1))
        while expert < num_experts:
            first_tile = records.numbers[np.uint32(expert)]
            num_slots = records.numbers[np.uint32(np.uint32(expert) + np.uint32(BINS))]
            first_unit = records.first_units[np.uint32(expert)] if WRITES_UNITS else np.int32(0)
            write_around(maps, Segment(expert, first_tile, num_slots, first_unit), writer)
            expert = np.int32(expert + np.int32(THREADS // WRITERS) * num_blocks)

    return write_around_others


def _build_first_of_thread(block: PlanBlock) -> Any:
    """(num_tiles, num_units): those of a thread's experts -> how many tiles and units lower experts have."""
    PARTS = block.num_parts
    BIN_STEPS = WARP_SIZE.bit_length() - 1 - block.part_steps
    WRITES_UNITS = block.unit_size is not None
    UNIT_WARPS = WARP_SIZE if WRITES_UNITS else 1

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
    def first_of_thread(num_tiles: np.int32, num_units: np.int32) -> tuple[np.int32, np.int32]:
        tiles_of_warp = cuda.shared.array(WARP_SIZE, np.int32)
        units_of_warp = cuda.shared.array(UNIT_WARPS, np.int32)
        warp = np.uint32(np.uint32(cuda.threadIdx.x) >> np.uint32(5))
        tiles_up_to = sum_in_warp(num_tiles)
        units_up_to = sum_in_warp(num_units) if WRITES_UNITS else np.int32(0)
        if lane_in_warp() == WARP_SIZE - 1:
            tiles_of_warp[warp] = tiles_up_to
            if WRITES_UNITS:
                units_of_warp[warp] = units_up_to
        cuda.syncthreads()
        tile = np.int32(sum_of_lower_warps(tiles_of_warp) + tiles_up_to - num_tiles)
        unit = np.int32(0)
        if WRITES_UNITS:
            unit = np.int32(sum_of_lower_warps(units_of_warp) + units_up_to - num_units)
        return tile, unit

    return first_of_thread
