"""Scores of a token -> its K best experts and their weights. One warp a token, one pass over its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys_device import NO_KEY, bfloat16_of_float, score_of_key
from moe.routing.rules_device import Rule
from moe.routing.selection_device import build_choose_best, build_sort_best, num_sorted, slots_per_lane
from moe.runtime.numba_warp_device import (
    WARP_SIZE,
    device_function,
    gdc_launch_dependents,
    gdc_wait,
    lane_in_warp,
    load_four,
    load_two,
    warp_in_block,
)

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


def build_topk_kernel(
    rule: Rule,
    *,
    num_experts: int,
    top_k: int,
    num_warps: int,
    num_lanes: int,
    load_width: int,
    logit_of: Any,
    bias_of: Any,
    keep_best_groups: Any,
    keep_lanes_of_best_groups: Any,
    writes_replay: bool,
    uses_pdl: bool,
) -> Callable[..., None]:
    """The kernel of one rule over E=num_experts <= 2048 experts and K=top_k <= 32 choices.

    Args:
        num_warps: warps, and so tokens, of a block.
        num_lanes: lanes over which the choices are spread, where experts are equally likely.
        load_width: neighbours that one load reads, 1, 2 or 4, from addresses that are multiples of their size.
        logit_of, bias_of: device functions from an element in memory to float32. bias_of is None without bias.
        keep_best_groups: device function (keys, lane, warp) that rules experts out, or None.
        keep_lanes_of_best_groups: device function (best_keys, lane) that rules lanes out, or None.
        writes_replay: whether ids also go to replay_ptr.
        uses_pdl: wait for the kernel before, then let the one after start.
    """
    NUM_EXPERTS = num_experts
    TOP_K = top_k
    NUM_WARPS = num_warps
    SLOTS = slots_per_lane(num_experts)
    HAS_BIAS = bias_of is not None
    LANES_ARE_FULL = num_experts == SLOTS * WARP_SIZE
    NUM_SORTED = num_sorted(SLOTS, top_k if keep_lanes_of_best_groups is None else max(top_k, 2), num_lanes)
    WRITES_REPLAY = writes_replay
    USES_PDL = uses_pdl
    NEEDS_LOGIT = rule.weighs_logit
    score_of, normalize, key_of, weight_of = rule.score, rule.normalize, rule.key, rule.weight
    load_logits = build_row_load(logit_of, load_width, SLOTS, num_experts)
    load_biases = build_row_load(bias_of, load_width, SLOTS, num_experts) if HAS_BIAS else leave_zeros
    keep = keep_best_groups or leave_keys
    sort_best = build_sort_best(num_slots=SLOTS, length=NUM_SORTED)
    keep_lanes = keep_lanes_of_best_groups or leave_lanes
    choose_best = build_choose_best(num_slots=SLOTS, length=NUM_SORTED, count=top_k, num_warps=num_warps)

    def topk_kernel(
        logits_ptr: Any,  # [T, E] float32, or uint16 with the bits of bfloat16
        bias_ptr: Any,  # [E], likewise; null without bias
        expert_ids_ptr: Any,  # [T, K] int32
        weights_ptr: Any,  # [T, K] uint16: bits of bfloat16
        replay_ptr: Any,  # [>=T, K] int16; null without replay
        num_tokens: np.int32,
    ) -> None:
        if USES_PDL:
            gdc_wait()
            gdc_launch_dependents()
        lane = lane_in_warp()
        warp = warp_in_block()
        block = np.uint32(cuda.blockIdx.x)  # type: ignore[arg-type]
        token_in_grid = np.uint32(block * np.uint32(NUM_WARPS) + np.uint32(warp))
        if token_in_grid < np.uint32(num_tokens):
            token = np.int64(token_in_grid)  # token * E passes 2^31
            row = token * NUM_EXPERTS
            scores = cuda.local.array(SLOTS, np.float32)
            biases = cuda.local.array(SLOTS, np.float32)
            load_logits(logits_ptr, row, lane, scores)
            load_biases(bias_ptr, 0, lane, biases)
            for slot in range(SLOTS):
                is_expert = LANES_ARE_FULL or lane * np.int32(SLOTS) + np.int32(slot) < NUM_EXPERTS
                scores[slot] = score_of(scores[slot], biases[slot]) if is_expert else _MINUS_INFINITY
            normalize(scores)
            keys = cuda.local.array(SLOTS, np.uint32)
            for slot in range(SLOTS):
                is_expert = LANES_ARE_FULL or lane * np.int32(SLOTS) + np.int32(slot) < NUM_EXPERTS
                keys[slot] = key_of(scores[slot]) if is_expert else NO_KEY
            keep(keys, lane, warp)

            best_keys = cuda.local.array(NUM_SORTED, np.uint32)
            sort_best(keys, best_keys)
            keep_lanes(best_keys, lane)
            key, expert = choose_best(best_keys, keys, lane, warp)
            is_chosen = lane < TOP_K
            value = score_of_key(key)
            if NEEDS_LOGIT and is_chosen:
                value = logit_of(logits_ptr[row + expert])
            weight = weight_of(value, is_chosen)
            if is_chosen:
                position = token * TOP_K + lane
                expert_ids_ptr[position] = expert
                weights_ptr[position] = bfloat16_of_float(weight)
                if WRITES_REPLAY:
                    replay_ptr[position] = np.int16(expert)

    return topk_kernel


def build_row_load(number_of: Any, width: int, num_slots: int, num_experts: int) -> Any:
    """(pointer, first, lane, values): load this lane's slots of the row that begins at `first`, 0 beyond its end."""
    WIDTH = width
    SLOTS = num_slots
    NUM_EXPERTS = num_experts
    LANES_ARE_FULL = num_experts == num_slots * WARP_SIZE

    @device_function
    def load_row(pointer: Any, first: Any, lane: np.int32, values: Any) -> None:
        for slot in range(0, SLOTS, WIDTH):
            expert = lane * np.int32(SLOTS) + np.int32(slot)
            for index in range(WIDTH):
                values[slot + index] = _ZERO
            if LANES_ARE_FULL or expert < NUM_EXPERTS:
                if WIDTH == 4:
                    a, b, c, d = load_four(pointer, first + expert)
                    values[slot] = number_of(a)
                    values[slot + 1] = number_of(b)
                    values[slot + 2] = number_of(c)
                    values[slot + 3] = number_of(d)
                elif WIDTH == 2:
                    a, b = load_two(pointer, first + expert)
                    values[slot] = number_of(a)
                    values[slot + 1] = number_of(b)
                else:
                    values[slot] = number_of(pointer[first + expert])

    return load_row


@device_function
def leave_zeros(pointer: Any, first: Any, lane: np.int32, values: Any) -> None:
    for slot in range(len(values)):
        values[slot] = _ZERO


@device_function
def leave_keys(keys: Any, lane: np.int32, warp: np.int32) -> None:
    pass


@device_function
def leave_lanes(best_keys: Any, lane: np.int32) -> None:
    pass
