"""GEMM1 without a permutation, on CUDA cores. One program per (slot, block of activation columns)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.fused.few_tokens.tile_device import (
    Choices,
    Rows,
    expert_of_slot,
    first_step,
    load_vector,
    load_weights,
    row_and_column_of_lane,
)
from moe.gemm.activation_device import Swiglu, activate, activate_gated_at


@triton.jit(do_not_specialize=["first_expert", "num_experts"])
def few_token_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, an expert's weight after another
    expert_ids_ptr,  # [T, TOP_K] int32
    out_ptr,  # [T * TOP_K, OUT_FEATURES] bf16
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    bias_ptr,  # [E_local, rows of the weight] bf16 or fp32, or None
    first_expert,
    num_experts,  # local ones
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GATE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IS_SHUFFLED: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USES_PDL: tl.constexpr,
    TRIGGERS: tl.constexpr,  # lets the next kernel start early; else it starts when this one's programs have ended
    num_warps: tl.constexpr,
):
    WEIGHT_ROWS: tl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    IS_EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    if USES_PDL:
        # Wait, then trigger: what runs before gemm2's own wait may read all that was written before this kernel.
        tl.extra.cuda.gdc_wait()
        if TRIGGERS:
            tl.extra.cuda.gdc_launch_dependents()
    # Slots are the grid's fast axis: those that share an expert read a block of its weights one after another, from L2.
    slot = tl.program_id(0)
    expert, is_local = expert_of_slot(Choices(expert_ids_ptr, first_expert, num_experts), slot)
    if not is_local:
        return
    lane = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_lanes = lane < OUT_FEATURES
    SECOND: tl.constexpr = 8 if IS_SHUFFLED else 1 if IS_INTERLEAVED else OUT_FEATURES
    row, column = row_and_column_of_lane(lane, IS_GATED, IS_SHUFFLED, IS_INTERLEAVED)
    if bias_ptr is not None:
        # Before the products, so that nobody waits for it after them.
        bias_ptrs = bias_ptr + expert * WEIGHT_ROWS + row
        first_bias = tl.load(bias_ptrs, mask=in_lanes, other=0.0).to(tl.float32)
        if IS_GATED:
            second_bias = tl.load(bias_ptrs + SECOND, mask=in_lanes, other=0.0).to(tl.float32)
    first_ptrs = weights_ptr + expert * (WEIGHT_ROWS * IN_FEATURES)
    first_ptrs += first_step(row, ROW_STRIDE, BLOCK_STRIDE, BLOCK_K)
    second_ptrs = first_ptrs + SECOND * ROW_STRIDE
    first_rows, second_rows = Rows(first_ptrs, in_lanes), Rows(second_ptrs, in_lanes)
    vector_ptr = hidden_states_ptr + (slot // TOP_K).to(tl.int64) * IN_FEATURES

    first = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_k in tl.static_range(0, IN_FEATURES, BLOCK_K):
        first_weights = load_weights(first_rows, first_k, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N)
        if IS_GATED:
            second_weights = load_weights(second_rows, first_k, IN_FEATURES, BLOCK_STRIDE, IS_EVEN_N)
        vector = load_vector(vector_ptr, first_k, IN_FEATURES, BLOCK_N, BLOCK_K, num_warps)
        first += first_weights.to(tl.float32) * vector
        if IS_GATED:
            second += second_weights.to(tl.float32) * vector

    first_product = tl.sum(first, 1)
    if bias_ptr is not None:
        first_product += first_bias
    if IS_GATED:
        second_product = tl.sum(second, 1)
        if bias_ptr is not None:
            second_product += second_bias
        gate = first_product if IS_GATE_FIRST else second_product
        up = second_product if IS_GATE_FIRST else first_product
        pointers = Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr)
        activated = activate_gated_at(gate, up, pointers, expert, ACTIVATION)
    else:
        activated = activate(first_product, ACTIVATION)
    out_ptrs = out_ptr + slot.to(tl.int64) * OUT_FEATURES + column
    tl.store(out_ptrs, activated.to(tl.bfloat16), mask=in_lanes)
