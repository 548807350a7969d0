"""Count the slots of each expert, give each expert its first row, place each slot.

A block places the slots of one chunk, a round of one slot a thread after another. A slot's row is the first row of its
expert, plus the expert's slots in earlier chunks and rounds, plus those in earlier warps of its round, plus those in lower
lanes of its warp. Counts are sums of integers, so atomics on them give the same bits in every order.
"""
# numba's modules say of thread indices and atomics only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type,call-overload"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.warp import FULL_MASK, WARP_SIZE, device_function

NOT_LOCAL = np.int32(-1)
BATCH = 4  # loads that a thread has in flight where it may have one only
LONG_BATCH = 8  # likewise where it has many
SHARED_BYTES = 48 * 1024 - 256  # a block, without asking for more; 128 of them for the tiles of each warp


def counter_rows(num_bins: int, num_warps: int) -> int:
    """Rows of counters, a power of two: one a warp, or as many as fit in shared memory, shared by warps in turn."""
    num_rows = num_warps
    while num_bins * (2 * num_rows + 12) > SHARED_BYTES:
        num_rows //= 2
    return num_rows


def build_count_kernel(*, num_bins: int, num_warps: int) -> Callable[..., None]:
    """The kernel that counts the slots of each expert, one chunk a block. Arguments as in `build_plan_kernel`."""
    BINS = num_bins
    THREADS = num_warps * WARP_SIZE

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


def build_plan_kernel(*, num_bins: int, num_warps: int, top_k: int, reads_counts: bool) -> Callable[..., None]:
    """The kernel that places all slots, one chunk a block.

    Args:
        num_bins: a power of two, at least 32 and the number of experts.
        num_warps: warps of a block, a power of two.
        top_k: slots of a token.
        reads_counts: take the counts of all chunks from `count_kernel`; else each block counts all slots itself.
    """
    BINS = num_bins
    THREADS = num_warps * WARP_SIZE
    ROWS = counter_rows(num_bins, num_warps)
    COUNTERS = ROWS * BINS
    TURNS = num_warps // ROWS
    TOP_K = np.uint32(top_k)
    READS_COUNTS = reads_counts
    BINS_A_THREAD = max(BINS // THREADS, 1)
    THREADS_A_BIN = max(THREADS // BINS, 1)

    def plan_kernel(
        expert_ids_ptr: Any,  # [T, K] int32
        counts_ptr: Any,  # [num_chunks, num_experts] int32; null unless READS_COUNTS
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
    ) -> None:
        thread = cuda.threadIdx.x
        start = np.int64(cuda.blockIdx.x) * chunk_slots
        end = min(start + chunk_slots, np.int64(num_slots))

        # Slots in earlier chunks, then the row of the expert's next slot.
        next_row = cuda.shared.array(BINS, np.int32)
        # Slots in this and later chunks, then the row past the expert's last.
        row_limit = cuda.shared.array(BINS, np.int32)
        first_row = cuda.shared.array(BINS, np.int32)
        for expert in range(thread, BINS, THREADS):
            next_row[expert] = 0
            row_limit[expert] = 0
        cuda.syncthreads()
        if READS_COUNTS:
            sum_counts(counts_ptr, BINS, THREADS, THREADS_A_BIN, num_experts, next_row, row_limit)
        else:
            count_slots(expert_ids_ptr, 0, num_slots, start, THREADS, first_expert, num_experts, next_row, row_limit)
        cuda.syncthreads()

        tiles_of_warp = cuda.shared.array(WARP_SIZE, np.int32)
        num_tiles = give_first_rows(first_row, next_row, row_limit, tiles_of_warp, BINS, BINS_A_THREAD, tile_shift)
        if cuda.blockIdx.x == 0 and thread == THREADS - 1:
            num_tiles_ptr[0] = num_tiles
            num_rows_ptr[0] = num_tiles << tile_shift
        cuda.syncthreads()
        write_tiles_and_padding(
            token_of_row_ptr, expert_of_tile_ptr, row_limit_of_tile_ptr, first_row, row_limit, num_experts, tile_shift
        )

        counters = cuda.shared.array(COUNTERS, np.uint16)
        while start < end:
            slot = start + thread
            expert = NOT_LOCAL
            if slot < end:
                expert = local_id(expert_ids_ptr[slot], first_expert, num_experts)
            for index in range(thread, COUNTERS, THREADS):
                counters[index] = 0
            cuda.syncthreads()
            counter = thread // (TURNS * WARP_SIZE) * BINS + max(expert, 0)
            rank = count_in_order(expert, counters, counter, TURNS)
            for bin in range(thread, BINS, THREADS):
                next_row[bin] += sum_counters_from_last(counters, bin, BINS, ROWS)
            cuda.syncthreads()
            if slot < end:
                row = NOT_LOCAL
                if expert != NOT_LOCAL:
                    row = np.int32(next_row[expert] - counters[counter] + rank)
                    token_of_row_ptr[row] = np.uint32(slot) // TOP_K
                row_of_slot_ptr[slot] = row
            cuda.syncthreads()
            start += THREADS

    return plan_kernel


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


@device_function
def sum_counts(
    counts_ptr: Any,
    num_bins: int,
    num_threads: int,
    threads_a_bin: int,
    num_experts: np.int32,
    before: Any,
    after: Any,
) -> None:
    """Add the counts of all chunks: to `before` those below this block's chunk, to `after` the others."""
    this_chunk, num_chunks = cuda.blockIdx.x, cuda.gridDim.x
    counts = cuda.local.array(LONG_BATCH, np.int32)
    expert = cuda.threadIdx.x % num_bins
    while expert < num_experts:
        num_before = np.int32(0)
        num_after = np.int32(0)
        chunk = cuda.threadIdx.x // num_bins
        while chunk < num_chunks:
            for index in range(LONG_BATCH):
                counts[index] = 0
                if chunk + index * threads_a_bin < num_chunks:
                    counts[index] = counts_ptr[(chunk + index * threads_a_bin) * num_experts + expert]
            for index in range(LONG_BATCH):
                if chunk + index * threads_a_bin < this_chunk:
                    num_before += counts[index]
                else:
                    num_after += counts[index]
            chunk += LONG_BATCH * threads_a_bin
        cuda.atomic.add(before, expert, num_before)
        cuda.atomic.add(after, expert, num_after)
        expert += num_threads


@device_function
def give_first_rows(
    first_row: Any,
    next_row: Any,
    row_limit: Any,
    tiles_of_warp: Any,
    num_bins: int,
    bins_a_thread: int,
    tile_shift: np.int32,
) -> np.int32:
    """From counts of each expert's slots, before and from this chunk on, to rows. Returns the tiles up to this thread's last.

    A thread takes neighbouring experts, so that a scan over threads is one over experts.
    """
    first_bin = cuda.threadIdx.x * bins_a_thread
    tiles_of_thread = np.int32(0)
    if first_bin < num_bins:
        for index in range(bins_a_thread):
            bin = first_bin + index
            tiles_of_thread += num_tiles_of(next_row[bin] + row_limit[bin], tile_shift)
    tile = tiles_before_thread(tiles_of_thread, tiles_of_warp)
    if first_bin < num_bins:
        for index in range(bins_a_thread):
            bin = first_bin + index
            num_slots = next_row[bin] + row_limit[bin]
            row = tile << tile_shift
            first_row[bin] = row
            next_row[bin] += row
            row_limit[bin] = row + num_slots
            tile += num_tiles_of(num_slots, tile_shift)
    return np.int32(tile)


@device_function
def tiles_before_thread(num_tiles: np.int32, tiles_of_warp: Any) -> np.int32:
    """Tiles of each thread -> those of all threads before it. tiles_of_warp has one element a warp, for this to use."""
    warp, lane = cuda.threadIdx.x // WARP_SIZE, cuda.threadIdx.x % WARP_SIZE
    up_to_lane = num_tiles
    for distance in (1, 2, 4, 8, 16):
        of_lower_lanes = cuda.shfl_up_sync(FULL_MASK, up_to_lane, distance)
        if lane >= distance:
            up_to_lane += of_lower_lanes
    if lane == WARP_SIZE - 1:
        tiles_of_warp[warp] = up_to_lane
    cuda.syncthreads()
    before_warp = np.int32(0)
    if lane < warp:
        before_warp = tiles_of_warp[lane]
    for distance in (16, 8, 4, 2, 1):
        before_warp += cuda.shfl_xor_sync(FULL_MASK, before_warp, distance)
    return np.int32(before_warp + up_to_lane - num_tiles)


@device_function
def write_tiles_and_padding(
    token_of_row_ptr: Any,
    expert_of_tile_ptr: Any,
    row_limit_of_tile_ptr: Any,
    first_row: Any,
    row_limit: Any,
    num_experts: np.int32,
    tile_shift: np.int32,
) -> None:
    """Write what is known of each expert's rows before its slots are placed. All threads of the grid share the work.

    As many threads an expert as rows a tile: each writes at most one padding row, and seldom more than one tile.
    """
    num_threads = cuda.gridDim.x * cuda.blockDim.x
    firsts = cuda.local.array(BATCH, np.int32)
    limits = cuda.local.array(BATCH, np.int32)
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while item < num_experts << tile_shift:
        for index in range(BATCH):
            expert = min((item + index * num_threads) >> tile_shift, num_experts - 1)
            firsts[index] = first_row[expert]
            limits[index] = row_limit[expert]
        for index in range(BATCH):
            expert = item >> tile_shift
            if expert < num_experts and firsts[index] < limits[index]:
                tile = firsts[index] >> tile_shift
                tile_limit = tile + num_tiles_of(limits[index] - firsts[index], tile_shift)
                thread_of_expert = item - (expert << tile_shift)
                row = limits[index] + thread_of_expert
                if row < tile_limit << tile_shift:
                    token_of_row_ptr[row] = NOT_LOCAL
                tile += thread_of_expert
                while tile < tile_limit:
                    expert_of_tile_ptr[tile] = expert
                    row_limit_of_tile_ptr[tile] = limits[index]
                    tile += 1 << tile_shift
            item += num_threads


@device_function
def count_in_order(expert: np.int32, counters: Any, counter: np.int32, num_turns: int) -> np.int32:
    """Count this thread's expert, if local, and wait for the block.

    Args:
        counters: uint16, zero: of each expert, in rows that each belong to num_turns neighbouring warps.
        counter: which of them is that of this thread's expert in its warp's row.
    Returns:
        Slots of the same expert before this one, of those counted in the same row.
    """
    warp = cuda.threadIdx.x // WARP_SIZE
    peers = cuda.match_any_sync(FULL_MASK, expert)
    rank = cuda.popc(peers & cuda.lanemask_lt())
    is_first = expert != NOT_LOCAL and rank == 0
    for turn in range(num_turns):
        if warp % num_turns == turn:
            rank += counters[counter]
            cuda.syncwarp()
            if is_first:
                counters[counter] = rank + cuda.popc(peers)
        cuda.syncthreads()
    return np.int32(rank)


@device_function
def sum_counters_from_last(counters: Any, bin: np.int32, num_bins: int, num_rows: int) -> np.int32:
    """Add to the counter of one expert in each row those of all later rows, and return the sum over all."""
    total = np.int32(0)
    counts = cuda.local.array(LONG_BATCH, np.int32)  # loaded before any is stored: no load waits for a store
    last = (num_rows - 1) * num_bins + bin
    rows_at_once = min(num_rows, LONG_BATCH)
    for _ in range(num_rows // rows_at_once):
        for index in range(rows_at_once):
            counts[index] = counters[last - index * num_bins]
        for index in range(rows_at_once):
            total += counts[index]
            counters[last - index * num_bins] = total
        last -= rows_at_once * num_bins
    return total
