"""Device functions: DeepSeek-V3's first step, which leaves the keys of the best groups of experts only.

A group's score is the sum of its two best. Of equal groups the lower comes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys import NO_KEY, key_of_score, score_of_key
from moe.warp import WARP_SIZE, device_function, warp_max, warp_min, word_across, word_of_lane


def build_keep_best_groups(*, num_experts: int, num_slots: int, n_group: int, topk_group: int, num_warps: int) -> Any:
    """(keys, lane, warp): the keys of all but the topk_group best groups become NO_KEY.

    Args:
        num_experts: of which n_group groups of neighbours have equally many, two at least.
        num_slots: length of `keys`: lane l has those of experts l * num_slots and up.
        num_warps: warps of a block, `warp` being one of them.
    """
    group_size = num_experts // n_group
    lanes_a_group = group_size // num_slots
    is_power_of_two = lanes_a_group & (lanes_a_group - 1) == 0
    if group_size % num_slots == 0 and is_power_of_two:
        return _groups_of_lanes(num_slots, lanes_a_group, n_group, topk_group)
    return _groups_of_any_size(num_slots, group_size, n_group, topk_group, num_warps)


def _groups_of_lanes(num_slots: int, lanes_a_group: int, n_group: int, topk_group: int) -> Any:
    """Where a group has all slots of a power of two of lanes: they exchange their best, then groups their scores."""
    SLOTS = num_slots
    LANES = lanes_a_group
    STEPS = lanes_a_group.bit_length() - 1
    NUM_GROUPS = n_group
    TOPK_GROUP = topk_group

    @device_function
    def keep_best_groups(keys: Any, lane: np.int32, warp: np.int32) -> None:
        first = keys[0]
        second = NO_KEY
        for slot in range(1, SLOTS):
            second = max(second, min(first, keys[slot]))
            first = max(first, keys[slot])
        for step in range(STEPS):
            other_first = word_across(first, 1 << step)
            other_second = word_across(second, 1 << step)
            second = max(min(first, other_first), max(second, other_second))
            first = max(first, other_first)
        mine = key_of_score(score_of_key(first) + score_of_key(second))
        num_better = 0
        for group in range(NUM_GROUPS):
            other = word_of_lane(mine, np.int32(group * LANES))
            is_better = other > mine or (other == mine and group < lane // np.int32(LANES))
            num_better += 1 if is_better else 0
        for slot in range(SLOTS):
            keys[slot] = keys[slot] if num_better < TOPK_GROUP else NO_KEY

    return keep_best_groups


def _groups_of_any_size(num_slots: int, group_size: int, n_group: int, topk_group: int, num_warps: int) -> Any:
    """The warp takes one group after another."""
    SLOTS = num_slots
    GROUP_SIZE = group_size
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
