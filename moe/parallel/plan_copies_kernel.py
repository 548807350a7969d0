"""Numbers of the copies and slots that go to each rank. One program a rank and block of tokens."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def plan_copies_kernel(
    rank_of_slot_ptr,  # [T, TOP_K] int32
    copy_ptr,  # [T, N] int32
    slot_ptr,  # [T, TOP_K] int32
    counts_ptr,  # [N, 2] int64
    num_tokens,
    num_ranks,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,  # tokens that are counted at once: more, since little is kept of them
):
    rank = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    choice = tl.arange(0, TOP_K_PAD)
    goes, ids = _goes(
        rank_of_slot_ptr, first, rank, num_tokens, choice, TOP_K, BLOCK
    )  # on its way while the others are counted
    # Each program counts all tokens before its own again: they are few bytes, and nobody waits for another.
    num_copies = tl.zeros([], tl.int64)
    num_slots = tl.zeros([], tl.int64)
    for start in range(0, first, COUNT_BLOCK):
        earlier, _ = _goes(rank_of_slot_ptr, start, rank, first, choice, TOP_K, COUNT_BLOCK)
        of_block = tl.sum(_copies_and_slots(earlier), 0)
        num_copies += of_block >> 16
        num_slots += of_block & 0xFFFF
    of_token = _copies_and_slots(goes)
    before = tl.cumsum(of_token, 0) - of_token
    token = first + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    copy = tl.where((of_token >> 16) > 0, num_copies.to(tl.int32) + (before >> 16), -1)
    tl.store(copy_ptr + token * num_ranks + rank, copy, mask=is_token)
    slot = num_slots.to(tl.int32) + (before & 0xFFFF)[:, None] + tl.cumsum(goes, 1) - goes
    at = slot_ptr + token[:, None] * TOP_K + choice[None, :]
    tl.store(at, slot, mask=goes > 0)
    in_slots = is_token[:, None] & (choice < TOP_K)[None, :]
    tl.store(at, tl.full([BLOCK, TOP_K_PAD], -1, tl.int32), mask=in_slots & (ids < 0) & (rank == 0))
    if first + BLOCK >= num_tokens:
        of_block = tl.sum(of_token, 0)
        tl.store(counts_ptr + 2 * rank, num_copies + (of_block >> 16))
        tl.store(counts_ptr + 2 * rank + 1, num_slots + (of_block & 0xFFFF))


@triton.jit
def _copies_and_slots(goes):
    """Of each token: 1 in the upper 16 bits where a copy goes, its slots in the lower, so that one sum and one scan take both.

    A block has fewer than 2^16 slots.
    """
    return (tl.max(goes, 1) << 16) | tl.sum(goes, 1)


@triton.jit
def _goes(rank_of_slot_ptr, first, rank, end, choice, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of tokens before `end`, [BLOCK, TOP_K_PAD]: 1 for slots that go to the rank, and the slots' ranks."""
    token = first + tl.arange(0, BLOCK)
    mask = (token < end)[:, None] & (choice < TOP_K)[None, :]
    ids = tl.load(rank_of_slot_ptr + token[:, None] * TOP_K + choice[None, :], mask=mask, other=-1)
    return (ids == rank).to(tl.int32), ids
