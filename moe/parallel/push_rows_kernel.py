"""This rank's rows and slots into the memory of all ranks. One program per (token, block of H), and one a block of padded slots."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.parallel.copy_device import rank_of_expert, token_word


@triton.jit
def push_rows_kernel(
    hidden_states_ptr,  # [T, HIDDEN] bf16
    ids_ptr,  # [T, TOP_K] int32
    weights_ptr,  # [T, TOP_K] bf16 or fp32
    num_copies_ptr,  # [E] int32
    rank_of_copy_ptr,  # [E, MAX_COPIES] int32
    rows_of_rank_ptr,  # [N] int64: addresses of [N, M, HIDDEN] bf16
    slots_of_rank_ptr,  # [N] int64: addresses of [N, 2, M, TOP_K] int32
    num_tokens,
    padded,  # M
    rank,  # this one
    layer,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_COPIES: tl.constexpr,
    SELECTS: tl.constexpr,  # a row goes to the ranks that compute a slot of it, else to all
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    if program < num_tokens * num_blocks:
        token = (program // num_blocks).to(tl.int64)
        column = program % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        in_row = column < HIDDEN
        values = tl.load(hidden_states_ptr + token * HIDDEN + column, mask=in_row, other=0.0)
        place = ((tl.zeros_like(token) + rank) * padded + token) * HIDDEN + column
        if SELECTS:
            choice = tl.arange(0, TOP_K_PAD)
            expert = tl.load(ids_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
            word = token_word(token + tl.zeros_like(choice), rank, layer)
            rank_of_slot = rank_of_expert(expert, word, num_copies_ptr, rank_of_copy_ptr, NUM_EXPERTS, MAX_COPIES)
        # Before the first store, which each of these loads would wait for.
        addresses = ()
        for step in tl.static_range(NUM_RANKS):
            address_of_peer = tl.load(rows_of_rank_ptr + (rank + 1 + step) % NUM_RANKS)
            addresses = addresses + (address_of_peer,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no starred tuples
        for step in tl.static_range(NUM_RANKS):
            # Each rank begins with its neighbour, so that no one is written to by all at once.
            peer = (rank + 1 + step) % NUM_RANKS
            address = addresses[step].to(tl.pointer_type(tl.bfloat16))  # type: ignore[var-annotated]
            is_sent = in_row
            if SELECTS:
                is_sent = in_row & (tl.max((rank_of_slot == peer).to(tl.int32), 0) > 0)
            tl.store(tl.multiple_of(address, 16) + place, values, mask=is_sent, cache_modifier=".cs")
    else:
        first = (program - num_tokens * num_blocks) * BLOCK_H
        _push_slots(ids_ptr, weights_ptr, slots_of_rank_ptr, first, num_tokens, padded, rank, NUM_RANKS, TOP_K, BLOCK_H)


@triton.jit
def _push_slots(
    ids_ptr,
    weights_ptr,
    slots_of_rank_ptr,
    first,
    num_tokens,
    padded,
    rank,
    NUM_RANKS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of ids, -1 from the last token on, and of weights' bits."""
    slot = first + tl.arange(0, BLOCK)
    is_slot = slot < num_tokens * TOP_K
    is_padded = slot < padded * TOP_K
    expert = tl.load(ids_ptr + slot, mask=is_slot, other=-1)
    weight = tl.load(weights_ptr + slot, mask=is_slot, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    size = tl.zeros([], tl.int64) + padded * TOP_K
    for step in tl.static_range(NUM_RANKS):
        peer = (rank + 1 + step) % NUM_RANKS
        address = tl.load(slots_of_rank_ptr + peer).to(tl.pointer_type(tl.int32)) + 2 * rank * size
        tl.store(address + slot, expert, mask=is_padded)
        tl.store(address + size + slot, weight, mask=is_padded)
