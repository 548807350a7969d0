"""Sums over the ranks' memory, in rank order. One program per (row, block of H)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.parallel.copy_device import rank_of_expert, token_word


@triton.jit
def pull_sum_kernel(
    partial_of_rank_ptr,  # [N] int64: addresses of [.., HIDDEN] bf16
    num_copies_ptr,  # [E] int32
    rank_of_copy_ptr,  # [E, MAX_COPIES] int32
    output_ptr,  # [num_rows, HIDDEN] bf16; None: the sums go to all ranks
    ids_ptr,  # [T, TOP_K] int32, where SELECTS
    sums_of_rank_ptr,  # [N] int64: addresses of [.., HIDDEN] bf16, where output_ptr is None
    first_row,  # of the rows that are summed, in every rank's memory
    rank,  # this one
    layer,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_COPIES: tl.constexpr,
    SELECTS: tl.constexpr,  # only ranks that computed a slot of the token have a sum of it
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column < HIDDEN
    place = (row + first_row) * HIDDEN + column
    if SELECTS:
        choice = tl.arange(0, TOP_K_PAD)
        expert = tl.load(ids_ptr + row * TOP_K + choice, mask=choice < TOP_K, other=-1)
        word = token_word(row + tl.zeros_like(choice), rank, layer)
        rank_of_slot = rank_of_expert(expert, word, num_copies_ptr, rank_of_copy_ptr, NUM_EXPERTS, MAX_COPIES)
    total = tl.zeros([BLOCK_H], tl.float32)
    for peer in tl.static_range(NUM_RANKS):
        address = tl.load(partial_of_rank_ptr + peer).to(tl.pointer_type(tl.bfloat16))
        is_there = in_row
        if SELECTS:
            is_there = in_row & (tl.max((rank_of_slot == peer).to(tl.int32), 0) > 0)
        total += tl.load(tl.multiple_of(address, 16) + place, mask=is_there, other=0.0).to(tl.float32)
    if output_ptr is not None:
        tl.store(output_ptr + row * HIDDEN + column, total.to(tl.bfloat16), mask=in_row)
    else:
        for step in tl.static_range(NUM_RANKS):
            peer = (rank + 1 + step) % NUM_RANKS
            address = tl.load(sums_of_rank_ptr + peer).to(tl.pointer_type(tl.bfloat16))
            tl.store(tl.multiple_of(address, 16) + place, total.to(tl.bfloat16), mask=in_row)
