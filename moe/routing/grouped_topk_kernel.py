"""DeepSeek-V3: the best groups of experts, then the K best experts within them. One warp a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys import NO_KEY, key_of_score, score_of_key
from moe.routing.rules import Rule
from moe.routing.selection import best_by_lane, best_of_lane, candidate_of_slot, slots_per_lane, take_best
from moe.routing.topk_kernel import store_choice
from moe.warp import WARP_SIZE, device_function, lane_in_warp, warp_in_grid, warp_max, warp_min


def build_grouped_topk_kernel(
    rule: Rule,
    *,
    num_experts: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    load_logit: Any,
    load_bias: Any,
    writes_replay: bool,
) -> Callable[..., None]:
    """The kernel of one rule over E=num_experts <= 2048 experts in n_group groups of neighbours.

    load_logit and load_bias are device functions (pointer, index) -> float32.
    """
    NUM_EXPERTS = num_experts
    TOP_K = top_k
    NUM_GROUPS = n_group
    TOPK_GROUP = topk_group
    GROUP_SIZE = num_experts // n_group
    SLOTS = slots_per_lane(num_experts)
    GROUP_SLOTS = slots_per_lane(n_group)
    WRITES_REPLAY = writes_replay
    score_of, weight_of = rule.score, rule.weight

    @device_function
    def two_best_of_group(keys: Any, group: np.int32, lane: np.int32) -> tuple[np.uint32, np.uint32]:
        """The two largest keys of a group, the same in all lanes."""
        first = NO_KEY
        second = NO_KEY
        for slot in range(SLOTS):
            if candidate_of_slot(slot, lane) // np.int32(GROUP_SIZE) == group:
                key = keys[slot]
                if key > first:
                    second = first
                    first = key
                elif key > second:
                    second = key
        best = warp_max(first)
        # of the lanes that hold an equal best, one has given it up
        owner = warp_min(np.uint32(lane if first == best else WARP_SIZE))
        return best, warp_max(second if np.uint32(lane) == owner else first)

    def grouped_topk_kernel(
        logits_ptr: Any,  # [T, E] float32, or uint16 with the bits of bfloat16
        bias_ptr: Any,  # [E], likewise; null without bias
        expert_ids_ptr: Any,  # [T, K] int32
        weights_ptr: Any,  # [T, K] uint16: bits of bfloat16
        replay_ptr: Any,  # [>=T, K] int16; null without replay
        num_tokens: np.int32,
    ) -> None:
        lane = lane_in_warp()
        token = warp_in_grid()  # int64: token * E passes 2^31
        if token < num_tokens:
            row = token * NUM_EXPERTS
            keys = cuda.local.array(SLOTS, np.uint32)
            for slot in range(SLOTS):
                expert = candidate_of_slot(slot, lane)
                keys[slot] = NO_KEY
                if expert < NUM_EXPERTS:
                    score = score_of(load_logit(logits_ptr, row + expert), load_bias(bias_ptr, expert))
                    keys[slot] = key_of_score(score)

            group_keys = cuda.local.array(GROUP_SLOTS, np.uint32)
            for group_slot in range(GROUP_SLOTS):
                group_keys[group_slot] = NO_KEY
                for group_lane in range(WARP_SIZE):
                    group = candidate_of_slot(group_slot, np.int32(group_lane))
                    if group < NUM_GROUPS:
                        first, second = two_best_of_group(keys, group, lane)
                        if group_lane == lane:
                            group_keys[group_slot] = key_of_score(score_of_key(first) + score_of_key(second))

            candidates = cuda.local.array(SLOTS, np.uint32)
            for slot in range(SLOTS):
                candidates[slot] = NO_KEY
            lane_key, lane_slot = best_of_lane(group_keys)
            for _ in range(TOPK_GROUP):
                _, group, lane_key, lane_slot = take_best(group_keys, lane_key, lane_slot, lane)
                for slot in range(SLOTS):
                    if candidate_of_slot(slot, lane) // np.int32(GROUP_SIZE) == group:
                        candidates[slot] = keys[slot]

            key, expert = best_by_lane(candidates, TOP_K, lane)
            logit = load_logit(logits_ptr, row + expert)
            weight = weight_of(logit, score_of_key(key), lane < TOP_K)
            if lane < TOP_K:
                position = token * TOP_K + lane
                store_choice(position, expert, weight, expert_ids_ptr, weights_ptr, replay_ptr, WRITES_REPLAY)

    return grouped_topk_kernel
