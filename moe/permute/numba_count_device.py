"""Device functions: count the slots of each expert, or sum what was counted of each chunk."""
# numba's modules say of thread indices and atomics only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from moe.permute.chunks import NUMBA_CHUNKING
from moe.runtime.numba_warp_device import device_function, load_four

NOT_LOCAL = np.int32(-1)
COUNTS_A_LOAD = NUMBA_CHUNKING.columns_a_load


class Slots(NamedTuple):
    """Which expert each slot chose, and which experts lie here."""

    expert_ids_ptr: Any  # [T, K] int32
    first_expert: np.int32
    num_experts: np.int32


@device_function
def clear(words: Any, num_words: int, num_threads: int) -> None:
    thread = np.uint32(cuda.threadIdx.x)
    for turn in range(num_words // num_threads):
        words[np.uint32(thread + np.uint32(turn * num_threads))] = 0
    last = np.uint32(thread + np.uint32(num_words // num_threads * num_threads))
    if last < np.uint32(num_words):
        words[last] = 0


@device_function
def local_id(expert_id: np.int32, slots: Slots) -> np.int32:
    """Number of an expert among those that lie here, or NOT_LOCAL."""
    number = np.uint32(np.uint32(expert_id) - np.uint32(slots.first_expert))  # wraps: a lower id becomes a large one
    return np.int32(number) if number < np.uint32(slots.num_experts) else NOT_LOCAL


@device_function
def chunk_of_block(num_slots: np.int32, chunk_slots: np.int32) -> tuple[np.uint32, np.uint32]:
    """Its first slot, and the one after its last."""
    start = np.uint32(np.uint32(cuda.blockIdx.x) * np.uint32(chunk_slots))
    end = np.uint32(min(np.uint32(start + np.uint32(chunk_slots)), np.uint32(num_slots)))
    return start, end


def build_count_slots(num_threads: int, num_bins: int) -> Any:
    """(slots, first, end, border, counts): count slots [first, end) of each expert.

    Those from `border` on are added to counts[num_bins:].
    """
    THREADS = num_threads
    count_eight, count_four = _build_count_batch(8, num_threads, num_bins), _build_count_batch(4, num_threads, num_bins)
    count_two, count_one = _build_count_batch(2, num_threads, num_bins), _build_count_batch(1, num_threads, num_bins)

    @device_function
    def count_slots(slots: Slots, first: np.uint32, end: np.uint32, border: np.uint32, counts: Any) -> None:
        slot = np.uint32(first + np.uint32(cuda.threadIdx.x))
        while np.uint32(slot + np.uint32(7 * THREADS)) < end:
            count_eight(slots, slot, border, counts)
            slot = np.uint32(slot + np.uint32(8 * THREADS))
        if np.uint32(slot + np.uint32(3 * THREADS)) < end:
            count_four(slots, slot, border, counts)
            slot = np.uint32(slot + np.uint32(4 * THREADS))
        if np.uint32(slot + np.uint32(THREADS)) < end:
            count_two(slots, slot, border, counts)
            slot = np.uint32(slot + np.uint32(2 * THREADS))
        if slot < end:
            count_one(slots, slot, border, counts)

    return count_slots


def _build_count_batch(size: int, num_threads: int, num_bins: int) -> Any:
    """Count a slot and each num_threads-th after it, `size` in all, whose ids are loaded together."""
    SIZE = size
    THREADS = num_threads
    SECOND = np.uint32(num_bins)

    @device_function
    def count_batch(slots: Slots, slot: np.uint32, border: np.uint32, counts: Any) -> None:
        ids = cuda.local.array(SIZE, np.int32)
        for index in range(SIZE):
            ids[index] = slots.expert_ids_ptr[np.uint32(slot + np.uint32(index * THREADS))]
        for index in range(SIZE):
            expert = local_id(ids[index], slots)
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
