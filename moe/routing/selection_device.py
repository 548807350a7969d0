"""Device functions: the best of the candidates that the lanes of a warp hold, one after another.

Lane l holds candidates l * S to l * S + S - 1, so that of equal candidates the one of the lowest lane comes first. Loops
over slots have constant bounds: unrolled, they keep the arrays in registers.
"""

# numba's modules say of warp functions only how they are compiled.
# mypy: disable-error-code="operator,call-arg,arg-type"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from moe.routing.keys_device import NO_KEY
from moe.runtime.numba_warp_device import FULL_MASK, WARP_SIZE, device_function, warp_max, word_of_lane

HAS_MORE_KEY = np.uint32(0xFFFFFFFF)  # larger than any other key, and that of computed NaNs


def slots_per_lane(num_candidates: int) -> int:
    """Slots that each lane needs: 1, 2 or a multiple of 4, which one load may fill."""
    needed = -(-num_candidates // WARP_SIZE)
    return needed if needed <= 2 else -(-needed // 4) * 4


def num_sorted(num_slots: int, count: int, num_lanes: int) -> int:
    """Of its best keys, those that a lane sorts to give away: a power of two.

    All that it may have to give, or 8, where no lane has to give more if `count` choices fall at random on `num_lanes` lanes,
    but in a few warps of a thousand.
    """
    likely = 8 if count <= 2 * num_lanes else count
    return 1 << (min(num_slots, count, likely) - 1).bit_length()


def build_sort_best(*, num_slots: int, length: int) -> Any:
    """(keys, best_keys): the largest of a lane's keys, descending, NO_KEY where there are fewer.

    Args:
        num_slots: length of `keys`, which stay as they are.
        length: of `best_keys`, a power of two.
    """
    SLOTS = num_slots
    LENGTH = length
    LAST = LENGTH - 1
    BLOCKS = -(-num_slots // LENGTH)
    sort, sort_wave = build_sort(LENGTH), _build_sort_wave(LENGTH)

    @device_function
    def sort_best(keys: Any, best_keys: Any) -> None:
        for slot in range(LENGTH):
            best_keys[slot] = keys[slot] if slot < SLOTS else NO_KEY
        sort(best_keys)
        if BLOCKS > 1:
            others = cuda.local.array(LENGTH, np.uint32)
            for block in range(1, BLOCKS):
                for slot in range(LENGTH):
                    others[slot] = keys[block * LENGTH + slot] if block * LENGTH + slot < SLOTS else NO_KEY
                sort(others)
                for slot in range(LENGTH):
                    best_keys[slot] = max(best_keys[slot], others[LAST - slot])
                sort_wave(best_keys)

    return sort_best


def build_choose_best(*, num_slots: int, length: int, count: int, num_warps: int) -> Any:
    """(best_keys, keys, lane, warp) -> key and number of the candidate that is the lane-th best; NO_KEY and 0 from lane `count` on.

    Each lane has sorted those of its best keys that it is likely to give away, without their slots, so that a choice takes one
    reduction and one vote. A warp in which a lane would have to give more begins again, and looks at all keys for each choice.
    In the end each lane looks up in which slot its key was. Among equal keys the lower number comes first.

    Args:
        num_slots: length of `keys`, which stay as they are.
        length: of `best_keys`, the largest of `keys`, descending, which are used up. A lane whose first is NO_KEY is ruled out.
        count: how many to choose, up to 32; so many have a key at least.
        num_warps: warps of a block, `warp` being one of them.
    """
    SLOTS = num_slots
    COUNT = count
    WORDS = 2 * count  # of a warp: the keys, then the lanes that hold them
    ALL_WORDS = num_warps * WORDS
    MAY_RUN_OUT = length < min(num_slots, count)
    choose_of_sorted = _build_choose_of_sorted(length, count, HAS_MORE_KEY if MAY_RUN_OUT else NO_KEY)
    choose_of_all = _build_choose_of_all(num_slots, count)
    slot_of_key = _build_slot_of_key(num_slots)

    @device_function
    def choose_best(best_keys: Any, keys: Any, lane: np.int32, warp: np.int32) -> tuple[np.uint32, np.int32]:
        # Choice by choice into memory, whence each lane takes its own: fewer instructions than a select a choice.
        chosen = cuda.shared.array(ALL_WORDS, np.uint32)
        first_word = np.uint32(warp * np.int32(WORDS))
        is_ruled_out = best_keys[0] == NO_KEY
        worst = choose_of_sorted(best_keys, chosen, first_word)
        if MAY_RUN_OUT and worst == HAS_MORE_KEY:  # all lanes the same
            choose_of_all(keys, is_ruled_out, chosen, first_word)
        cuda.syncwarp()

        is_chosen = lane < COUNT
        my_key = NO_KEY
        my_holders = np.uint32(1)
        if is_chosen:
            my_word = np.uint32(first_word + np.uint32(lane))
            my_key = chosen[my_word]
            my_holders = chosen[np.uint32(my_word + np.uint32(COUNT))]
        candidate = np.int32(cuda.ffs(my_holders) - 1)  # the lane that gave the key away
        if SLOTS > 1:
            slot = slot_of_key(keys, my_key, candidate, lane, is_chosen)
            candidate = np.int32(candidate * np.int32(SLOTS) + slot)
        return my_key, candidate if is_chosen else np.int32(0)

    return choose_best


def _build_choose_of_sorted(length: int, count: int, key_beyond: np.uint32) -> Any:
    """(best_keys, chosen, first_word) -> the last choice's key. `chosen` takes `count` keys, from first_word on, then the lanes that have them.

    Args:
        length: of `best_keys`, descending, which are used up.
        key_beyond: what a lane has left that gave all away.
    """
    LAST = length - 1
    COUNT = count
    KEY_BEYOND = key_beyond

    @device_function
    def choose_of_sorted(best_keys: Any, chosen: Any, first_word: np.uint32) -> np.uint32:
        lower_lanes = cuda.lanemask_lt()
        best = NO_KEY
        for choice in range(COUNT):
            best = warp_max(best_keys[0])
            is_best = best_keys[0] == best
            holders = np.uint32(cuda.ballot_sync(FULL_MASK, is_best))
            is_taken = is_best and holders & lower_lanes == 0
            chosen[np.uint32(first_word + np.uint32(choice))] = best  # all lanes the same
            chosen[np.uint32(first_word + np.uint32(COUNT + choice))] = holders
            for slot in range(LAST):
                best_keys[slot] = best_keys[slot + 1] if is_taken else best_keys[slot]
            best_keys[LAST] = KEY_BEYOND if is_taken else best_keys[LAST]
        return best

    return choose_of_sorted


def _build_choose_of_all(num_slots: int, count: int) -> Any:
    """(keys, is_ruled_out, chosen, first_word): as `choose_of_sorted`, of unsorted keys. A lane that is ruled out gives none away."""
    SLOTS = num_slots
    COUNT = count

    @device_function
    def choose_of_all(keys: Any, is_ruled_out: bool, chosen: Any, first_word: np.uint32) -> None:
        cuda.syncwarp()  # what was chosen of the sorted is written over
        lower_lanes = cuda.lanemask_lt()
        # What the lane gave away last: it gives its largest first, of equal ones that of the lowest slot.
        last = NO_KEY if is_ruled_out else HAS_MORE_KEY  # no key is above this one, and none below that one
        last_slot = np.int32(-1)
        for choice in range(COUNT):
            mine = NO_KEY
            my_slot = np.int32(0)
            for slot in range(SLOTS):
                is_left = (keys[slot] < last) | ((keys[slot] == last) & (np.int32(slot) > last_slot))
                is_better = is_left & (keys[slot] > mine)
                mine = keys[slot] if is_better else mine
                my_slot = np.int32(slot) if is_better else my_slot
            best = warp_max(mine)
            is_best = mine == best
            holders = np.uint32(cuda.ballot_sync(FULL_MASK, is_best))
            is_taken = is_best and holders & lower_lanes == 0
            chosen[np.uint32(first_word + np.uint32(choice))] = best
            chosen[np.uint32(first_word + np.uint32(COUNT + choice))] = holders
            last = best if is_taken else last
            last_slot = my_slot if is_taken else last_slot

    return choose_of_all


def _build_slot_of_key(num_slots: int) -> Any:
    """(keys, key, holder, lane, is_chosen) -> in which slot of lane `holder` the key is.

    Of equal keys of one holder, which neighbouring lanes have chosen, the first lane has the first slot, and so on.
    """
    SLOTS = num_slots
    LAST = num_slots - 1

    @device_function
    def slot_of_key(keys: Any, key: np.uint32, holder: np.int32, lane: np.int32, is_chosen: bool) -> np.int32:
        lower = max(np.int32(lane - 1), np.int32(0))
        lower_key = word_of_lane(key, lower)  # all lanes take part
        lower_holder = word_of_lane(np.uint32(holder), lower)
        repeats = is_chosen and lane > 0 and lower_key == key and lower_holder == np.uint32(holder)
        repeating = np.uint32(cuda.ballot_sync(FULL_MASK, repeats))
        found = np.int32(0)
        if repeating == 0:
            for index in range(SLOTS):
                is_equal = word_of_lane(keys[LAST - index], holder) == key
                found = np.int32(LAST - index) if is_equal else found  # the first slot is looked at last
        else:
            num_before = np.int32(lane - first_of_run(repeating, lane))
            for slot in range(SLOTS):
                is_equal = word_of_lane(keys[slot], holder) == key
                found = np.int32(slot) if is_equal and num_before == 0 else found
                num_before = np.int32(num_before - (1 if is_equal else 0))
        return found

    return slot_of_key


@device_function
def first_of_run(repeating: np.uint32, lane: np.int32) -> np.int32:
    """The nearest lane, from this one down, whose bit is not set: all after it repeat it."""
    up_to_here = np.uint32(np.uint32(cuda.lanemask_lt() << np.uint32(1)) | np.uint32(1))
    return np.int32(31 - cuda.clz(np.uint32(np.uint32(~repeating) & up_to_here)))


def build_sort(length: int) -> Any:
    """(keys): sort so many, a power of two, descending. Equal keys are alike: nothing tells which came first.

    Batcher's odd-even merge sort, of 19 comparisons for 8 keys, 63 for 16. Parts of 1, 2, 4, .. neighbours are joined: keys at
    a distance are compared, from a whole part down to 1, and between the first such turn and the last those of the second half
    of one pair with the first half of the next.
    """
    PAIRS, STEPS = length // 2, length.bit_length() - 1

    @device_function
    def sort(keys: Any) -> None:
        for step in range(STEPS):
            for turn in range(step + 1):
                distance = 1 << (step - turn)
                first = 0 if turn == 0 else distance
                for pair in range(PAIRS):
                    low = first + 2 * pair - (pair & (distance - 1))
                    is_joined = low >> (step + 1) == (low + distance) >> (step + 1)
                    high = low + distance if is_joined else low  # a key beside itself stays
                    here, there = keys[low], keys[high]
                    keys[low] = max(here, there)
                    keys[high] = min(here, there)

    return sort


def _build_sort_wave(length: int) -> Any:
    """(keys): sort them, descending, where they fall and rise or rise and fall, at most once each."""
    PAIRS, STEPS = length // 2, length.bit_length() - 1

    @device_function
    def sort_wave(keys: Any) -> None:
        for turn in range(STEPS):
            distance = 1 << (STEPS - 1 - turn)
            for pair in range(PAIRS):
                low = 2 * pair - (pair & (distance - 1))
                here, there = keys[low], keys[low + distance]
                keys[low] = max(here, there)
                keys[low + distance] = min(here, there)

    return sort_wave
