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
    # Each program counts all tokens before its own again: they are few bytes, and nobody waits for another.
    num_copies = tl.zeros([], tl.int64)
    num_slots = tl.zeros([], tl.int64)
    for start in range(0, first, COUNT_BLOCK):
        earlier, _ = _goes(rank_of_slot_ptr, start, rank, first, choice, TOP_K, COUNT_BLOCK)
        num_copies += tl.sum(tl.max(earlier, 1), 0)
        num_slots += tl.sum(tl.sum(earlier, 1), 0)
    goes, ids = _goes(rank_of_slot_ptr, first, rank, num_tokens, choice, TOP_K, BLOCK)
    token = first + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    sends = tl.max(goes, 1)
    copy = tl.where(sends > 0, num_copies.to(tl.int32) + tl.cumsum(sends, 0) - sends, -1)
    tl.store(copy_ptr + token * num_ranks + rank, copy, mask=is_token)
    of_token = tl.sum(goes, 1)
    before = num_slots.to(tl.int32) + tl.cumsum(of_token, 0) - of_token
    slot = before[:, None] + tl.cumsum(goes, 1) - goes
    at = slot_ptr + token[:, None] * TOP_K + choice[None, :]
    tl.store(at, slot, mask=goes > 0)
    in_slots = is_token[:, None] & (choice < TOP_K)[None, :]
    tl.store(at, tl.full([BLOCK, TOP_K_PAD], -1, tl.int32), mask=in_slots & (ids < 0) & (rank == 0))
    if first + BLOCK >= num_tokens:
        tl.store(counts_ptr + 2 * rank, num_copies + tl.sum(sends, 0))
        tl.store(counts_ptr + 2 * rank + 1, num_slots + tl.sum(of_token, 0))


@triton.jit
def _goes(rank_of_slot_ptr, first, rank, end, choice, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of tokens before `end`, [BLOCK, TOP_K_PAD]: 1 for slots that go to the rank, and the slots' ranks."""
    token = first + tl.arange(0, BLOCK)
    mask = (token < end)[:, None] & (choice < TOP_K)[None, :]
    ids = tl.load(rank_of_slot_ptr + token[:, None] * TOP_K + choice[None, :], mask=mask, other=-1)
    return (ids == rank).to(tl.int32), ids
