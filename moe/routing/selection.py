"""Device functions: the best of the candidates that the lanes of a warp hold, one after another.

Lane l holds candidates l * S to l * S + S - 1, so that of equal candidates the one of the lowest lane comes first. Loops
over slots have constant bounds: unrolled, they keep the arrays in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys import NO_KEY
from moe.warp import FULL_MASK, WARP_SIZE, device_function, warp_max

LONGEST_RUN = 8  # slots that a lane sorts: their numbers in the run, of 4 bits each, lie in one word
_BITS = np.uint32(4)
_MASK = np.uint32(15)


def slots_per_lane(num_candidates: int) -> int:
    """Slots that each lane needs: 1, 2 or a multiple of 4, which one load may fill."""
    needed = -(-num_candidates // WARP_SIZE)
    return needed if needed <= 2 else -(-needed // 4) * 4


def build_choose_best(*, num_slots: int, count: int) -> Any:
    """(keys, lane) -> key and number of the candidate that is the lane-th best; NO_KEY and 0 from lane `count` on.

    Each lane sorts its slots first, in runs, so that a choice takes one reduction, one vote and one shift of a run. Among
    equal keys the lower number comes first.

    Args:
        num_slots: length of `keys`. They are lost.
        count: how many to choose, up to 32; so many have a key at least.
    """
    SLOTS = num_slots
    COUNT = count
    RUN = next(length for length in range(LONGEST_RUN, 0, -1) if num_slots % length == 0)
    LAST = RUN - 1
    RUNS = num_slots // RUN

    @device_function
    def choose_best(keys: Any, lane: np.int32) -> tuple[np.uint32, np.int32]:
        order = cuda.local.array(RUNS, np.uint32)  # of each run: in which slot each of its keys was, the first lowest
        for run in range(RUNS):
            order[run] = sort_run(keys, run * RUN, RUN)
        lower_lanes = cuda.lanemask_lt()
        my_key = NO_KEY
        my_candidate = np.uint32(0)
        for choice in range(COUNT):
            head = keys[0]
            run_of_head = 0
            slot = np.uint32(order[0] & _MASK)
            for run in range(1, RUNS):
                is_higher = keys[run * RUN] > head
                head = keys[run * RUN] if is_higher else head
                run_of_head = run if is_higher else run_of_head
                slot = np.uint32(np.uint32(run * RUN) + (order[run] & _MASK)) if is_higher else slot
            best = warp_max(head)
            holders = cuda.ballot_sync(FULL_MASK, head == best)
            is_mine = head == best and holders & lower_lanes == 0
            # Only the lane that gives a candidate away names one.
            candidate = warp_max(np.uint32(np.uint32(lane) * np.uint32(SLOTS) + slot) if is_mine else np.uint32(0))
            my_key = best if choice == lane else my_key
            my_candidate = candidate if choice == lane else my_candidate
            for run in range(RUNS):
                is_shifted = is_mine and run == run_of_head
                for slot_of_run in range(LAST):
                    here = run * RUN + slot_of_run
                    keys[here] = keys[here + 1] if is_shifted else keys[here]
                keys[run * RUN + LAST] = NO_KEY if is_shifted else keys[run * RUN + LAST]
                order[run] = np.uint32(order[run] >> _BITS) if is_shifted else order[run]
        return my_key, np.int32(my_candidate)

    return choose_best


@device_function
def sort_run(keys: Any, first: int, length: int) -> np.uint32:
    """Sort `length` keys from `first` on, descending, equal ones left in order. Returns their slots, 4 bits each."""
    slots = cuda.local.array(LONGEST_RUN, np.uint32)
    for slot in range(length):
        slots[slot] = np.uint32(slot)
    for turn in range(length):
        for slot in range(turn % 2, length - 1, 2):
            here, there = keys[first + slot], keys[first + slot + 1]
            slot_here, slot_there = slots[slot], slots[slot + 1]
            is_swapped = here < there
            keys[first + slot] = there if is_swapped else here
            keys[first + slot + 1] = here if is_swapped else there
            slots[slot] = slot_there if is_swapped else slot_here
            slots[slot + 1] = slot_here if is_swapped else slot_there
    order = np.uint32(0)
    for slot in range(length):
        order = np.uint32(order | np.uint32(slots[slot] << np.uint32(_BITS * np.uint32(slot))))
    return order
