"""Each token's row and slots, a copy a rank that it goes to. One program per (token, block of H)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def pack_rows_kernel(
    rows_ptr,  # [R, HIDDEN] bf16
    slots_ptr,  # [R, 2, TOP_K] int32
    row_of_copy_ptr,  # [T, N] int32
    hidden_states_ptr,  # [T, HIDDEN] bf16
    rank_of_slot_ptr,  # [T, TOP_K] int32
    local_ptr,  # [T, TOP_K] int32
    weights_ptr,  # [T, TOP_K] bf16 or fp32
    copy_ptr,  # [T, N] int32
    counts_ptr,  # [N, 2] int64
    num_ranks,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    column = block * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column < HIDDEN
    choice = tl.arange(0, TOP_K_PAD)
    is_choice = (choice < TOP_K) & (block == 0)
    values = tl.load(hidden_states_ptr + token * HIDDEN + column, mask=in_row, other=0.0)
    slot = token * TOP_K + choice
    rank_of_slot = tl.load(rank_of_slot_ptr + slot, mask=is_choice, other=-1)
    local = tl.load(local_ptr + slot, mask=is_choice, other=-1)
    weight = tl.load(weights_ptr + slot, mask=is_choice, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    # All loads before the first store, which they would wait for: one trip to memory, not one a rank.
    ranks = tl.arange(0, RANKS_PAD)
    is_rank = ranks < num_ranks
    copies = tl.load(copy_ptr + token * num_ranks + ranks, mask=is_rank, other=-1)
    counts = tl.load(counts_ptr + 2 * ranks, mask=is_rank, other=0)
    row_of_rank = tl.where(copies >= 0, tl.cumsum(counts, 0) - counts + copies, -1)
    tl.store(row_of_copy_ptr + token * num_ranks + ranks, row_of_rank.to(tl.int32), mask=is_rank & (block == 0))
    for rank in range(num_ranks):
        row = tl.sum(tl.where(ranks == rank, row_of_rank, 0), 0)
        is_sent = row >= 0
        tl.store(rows_ptr + row * HIDDEN + column, values, mask=in_row & is_sent, cache_modifier=".cs")
        there = tl.where(rank_of_slot == rank, local, -1)
        tl.store(slots_ptr + row * 2 * TOP_K + choice, there, mask=is_choice & is_sent)
        tl.store(slots_ptr + (row * 2 + 1) * TOP_K + choice, weight, mask=is_choice & is_sent)
