"""Device functions: DeepSeek-V3's first step, which leaves the keys of the best groups of experts only.

A group's score is the sum of its two best. Of equal groups the lower comes first.
"""

# numba's modules say of warp functions only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys_device import NO_KEY, key_of_score, score_of_key
from moe.runtime.numba_warp_device import (
    FULL_MASK,
    WARP_SIZE,
    device_function,
    warp_max,
    warp_min,
    word_across,
    word_of_lane,
)


def fill_lanes(num_experts: int, num_slots: int, n_group: int) -> bool:
    """Whether each group has all slots of a power of two of lanes: lane l has experts l * num_slots and up."""
    lanes_a_group, rest = divmod(num_experts // n_group, num_slots)
    return not rest and lanes_a_group & (lanes_a_group - 1) == 0


def build_keep_lanes_of_best_groups(*, num_experts: int, num_slots: int, n_group: int, topk_group: int) -> Any:
    """(best_keys, lane): the first key of lanes whose group is none of the topk_group best becomes NO_KEY, where groups fill lanes.

    Lanes exchange their best, then share the comparisons of their group with the others.

    Args:
        num_experts: of which n_group groups of neighbours have equally many, two at least.
        num_slots: experts of a lane. `best_keys` are the best of them, descending, two at least if there are two.
    """
    LANES = num_experts // n_group // num_slots
    STEPS = LANES.bit_length() - 1
    NUM_GROUPS = n_group
    TOPK_GROUP = topk_group
    HAS_SECOND = num_slots > 1
    HAS_EVEN_TURNS = n_group % LANES == 0
    LANES_OF_FIRST_GROUP = np.uint32((1 << LANES) - 1)

    @device_function
    def keep_lanes_of_best_groups(best_keys: Any, lane: np.int32) -> None:
        first = best_keys[0]
        second = best_keys[1] if HAS_SECOND else NO_KEY
        for step in range(STEPS):
            other_first = word_across(first, 1 << step)
            other_second = word_across(second, 1 << step)
            second = max(min(first, other_first), max(second, other_second))
            first = max(first, other_first)
        mine = key_of_score(score_of_key(first) + score_of_key(second))
        group = np.int32(lane >> STEPS)
        group_lanes = np.uint32(LANES_OF_FIRST_GROUP << np.uint32(group << STEPS))
        num_better = 0
        for first_other in range(0, NUM_GROUPS, LANES):
            other_group = np.int32(np.int32(first_other) + (lane & np.int32(LANES - 1)))
            other = word_of_lane(mine, np.int32(other_group << STEPS) & np.int32(WARP_SIZE - 1))
            bar = np.uint32(mine - (np.uint32(1) if other_group < group else np.uint32(0)))  # no score has key 0
            is_better = other > bar and (HAS_EVEN_TURNS or other_group < NUM_GROUPS)
            better_lanes = np.uint32(cuda.ballot_sync(FULL_MASK, is_better))
            num_better += np.int32(cuda.popc(np.uint32(better_lanes & group_lanes)))
        # A lane's best is all that is looked at until it is taken.
        best_keys[0] = best_keys[0] if num_better < TOPK_GROUP else NO_KEY

    return keep_lanes_of_best_groups


def build_keep_best_groups(*, num_experts: int, num_slots: int, n_group: int, topk_group: int, num_warps: int) -> Any:
    """(keys, lane, warp): the keys of all but the topk_group best groups become NO_KEY. The warp takes one group after another.

    Args:
        num_experts: of which n_group groups of neighbours have equally many, two at least.
        num_slots: length of `keys`: lane l has those of experts l * num_slots and up.
        num_warps: warps of a block, `warp` being one of them.
    """
    SLOTS = num_slots
    GROUP_SIZE = num_experts // n_group
    NUM_GROUPS = n_group
    TOPK_GROUP = topk_group
    GROUP_KEYS = num_warps * n_group

    @device_function
    def key_of_group(keys: Any, group: int, lane: np.int32) -> np.uint32:
        first = NO_KEY
        second = NO_KEY
        for slot in range(SLOTS):
            is_in_group = (lane * np.int32(SLOTS) + np.int32(slot)) // np.int32(GROUP_SIZE) == group
            key = keys[slot] if is_in_group else NO_KEY
            second = max(second, min(first, key))
            first = max(first, key)
        best = warp_max(first)
        # of the lanes that hold an equal best, one has given it up
        owner = warp_min(np.uint32(lane if first == best else WARP_SIZE))
        return key_of_score(score_of_key(best) + score_of_key(warp_max(second if np.uint32(lane) == owner else first)))

    @device_function
    def keep_best_groups(keys: Any, lane: np.int32, warp: np.int32) -> None:
        group_keys = cuda.shared.array(GROUP_KEYS, np.uint32)
        first_key = warp * np.int32(NUM_GROUPS)
        for group in range(NUM_GROUPS):
            key = key_of_group(keys, group, lane)
            if lane == 0:
                group_keys[first_key + group] = key
        cuda.syncwarp()
        for slot in range(SLOTS):
            # Slots beyond the last expert hold NO_KEY already.
            mine = min((lane * np.int32(SLOTS) + np.int32(slot)) // np.int32(GROUP_SIZE), np.int32(NUM_GROUPS - 1))
            my_key = group_keys[first_key + mine]
            num_better = 0
            for group in range(NUM_GROUPS):
                other = group_keys[first_key + group]
                is_better = other > my_key or (other == my_key and group < mine)
                num_better += 1 if is_better else 0
            keys[slot] = keys[slot] if num_better < TOPK_GROUP else NO_KEY

    return keep_best_groups
