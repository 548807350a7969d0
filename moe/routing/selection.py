"""Device functions: the best of the candidates that the lanes of a warp hold, one after another.

Candidate i is in slot i // 32 of lane i % 32, so that a warp loads neighbours together. Loops over slots have constant
bounds: unrolled, they keep the arrays in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.routing.keys import NO_KEY
from moe.warp import WARP_SIZE, device_function, warp_max, warp_min

_NO_CANDIDATE = np.uint32(0xFFFFFFFF)


def slots_per_lane(num_candidates: int) -> int:
    """Slots that each lane needs, rounded up to a power of two so that few kernels differ in it."""
    return 1 << (-(-num_candidates // WARP_SIZE) - 1).bit_length()


@device_function
def candidate_of_slot(slot: int, lane: np.int32) -> np.int32:
    return np.int32(np.int32(slot) * np.int32(WARP_SIZE) + lane)


@device_function
def best_of_lane(keys: Any) -> tuple[np.uint32, np.int32]:
    """The largest key of this lane and its slot, the lowest among equals."""
    best_key = keys[0]
    best_slot = np.int32(0)
    for slot in range(1, len(keys)):
        if keys[slot] > best_key:
            best_key = keys[slot]
            best_slot = np.int32(slot)
    return best_key, best_slot


@device_function
def take_best(
    keys: Any, lane_key: np.uint32, lane_slot: np.int32, lane: np.int32
) -> tuple[np.uint32, np.int32, np.uint32, np.int32]:
    """Take the best candidate of the warp, the lowest among equals, out of the lane that holds it.

    Args:
        keys: this lane's keys; that of the candidate taken becomes NO_KEY.
        lane_key, lane_slot: what best_of_lane(keys) returned, or the last take_best. Only the lane that loses
            a candidate looks through its slots again.
    Returns:
        Key and number of the candidate, the same in all lanes; then this lane's new lane_key and lane_slot.
    """
    lane_candidate = np.uint32(candidate_of_slot(lane_slot, lane))
    best_key = warp_max(lane_key)
    best = warp_min(lane_candidate if lane_key == best_key else _NO_CANDIDATE)
    if best == lane_candidate:
        for slot in range(len(keys)):
            if slot == lane_slot:
                keys[slot] = NO_KEY
        lane_key, lane_slot = best_of_lane(keys)
    return best_key, np.int32(best), lane_key, lane_slot


@device_function
def best_by_lane(keys: Any, count: int, lane: np.int32) -> tuple[np.uint32, np.int32]:
    """Take the `count` best candidates of the warp. Lane k returns key and number of the k-th; others NO_KEY and 0."""
    my_key = NO_KEY
    my_candidate = np.int32(0)
    lane_key, lane_slot = best_of_lane(keys)
    for choice in range(count):
        key, candidate, lane_key, lane_slot = take_best(keys, lane_key, lane_slot, lane)
        if choice == lane:
            my_key = key
            my_candidate = candidate
    return my_key, my_candidate
