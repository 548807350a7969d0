"""Scores of a token -> its K best experts and their weights. One warp a token, one pass over its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys import NO_KEY, bfloat16_of_float, score_of_key
from moe.routing.rules import Rule
from moe.routing.selection import best_by_lane, candidate_of_slot, slots_per_lane
from moe.warp import device_function, lane_in_warp, warp_in_grid

_MINUS_INFINITY = np.float32(-np.inf)


def build_topk_kernel(
    rule: Rule, *, num_experts: int, top_k: int, load_logit: Any, load_bias: Any, writes_replay: bool
) -> Callable[..., None]:
    """The kernel of one rule over E=num_experts <= 2048 experts and K=top_k <= 32 choices.

    load_logit and load_bias are device functions (pointer, index) -> float32.
    """
    NUM_EXPERTS = num_experts
    TOP_K = top_k
    SLOTS = slots_per_lane(num_experts)
    WRITES_REPLAY = writes_replay
    score_of, normalize, key_of, weight_of = rule.score, rule.normalize, rule.key, rule.weight

    def topk_kernel(
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
            scores = cuda.local.array(SLOTS, np.float32)
            for slot in range(SLOTS):
                expert = candidate_of_slot(slot, lane)
                scores[slot] = _MINUS_INFINITY
                if expert < NUM_EXPERTS:
                    scores[slot] = score_of(load_logit(logits_ptr, row + expert), load_bias(bias_ptr, expert))
            normalize(scores)

            keys = cuda.local.array(SLOTS, np.uint32)
            for slot in range(SLOTS):
                keys[slot] = key_of(scores[slot]) if candidate_of_slot(slot, lane) < NUM_EXPERTS else NO_KEY

            key, expert = best_by_lane(keys, TOP_K, lane)
            logit = load_logit(logits_ptr, row + expert)
            weight = weight_of(logit, score_of_key(key), lane < TOP_K)
            if lane < TOP_K:
                position = token * TOP_K + lane
                store_choice(position, expert, weight, expert_ids_ptr, weights_ptr, replay_ptr, WRITES_REPLAY)

    return topk_kernel


@device_function
def store_choice(
    position: np.int64,
    expert: np.int32,
    weight: np.float32,
    expert_ids_ptr: Any,
    weights_ptr: Any,
    replay_ptr: Any,
    writes_replay: bool,
) -> None:
    expert_ids_ptr[position] = expert
    weights_ptr[position] = bfloat16_of_float(weight)
    if writes_replay:
        replay_ptr[position] = np.int16(expert)
