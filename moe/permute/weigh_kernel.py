"""Each slot's token times its weight. One program per (slot, block of H)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_expert", "num_experts"])
def weigh_kernel(
    hidden_states_ptr,  # [T, HIDDEN] bf16
    expert_ids_ptr,  # [T, TOP_K] int32
    weights_ptr,  # [T, TOP_K] bf16 or fp32
    weighed_ptr,  # [T * TOP_K, HIDDEN] bf16
    ones_ptr,  # [T, TOP_K] as the weights
    first_expert,
    num_experts,  # local ones
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    # int64 first: a slot times HIDDEN overflows int32 past 300k slots at 7168 columns.
    slot = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    if tl.program_id(0) % num_blocks == 0:
        tl.store(ones_ptr + slot, 1.0)
    expert = tl.load(expert_ids_ptr + slot)
    if (expert < first_expert) | (expert >= first_expert + num_experts):
        return
    in_row = column < HIDDEN
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    token = tl.load(hidden_states_ptr + slot // TOP_K * HIDDEN + column, mask=in_row, other=0.0).to(tl.float32)
    tl.store(weighed_ptr + slot * HIDDEN + column, (weight * token).to(tl.bfloat16), mask=in_row)
