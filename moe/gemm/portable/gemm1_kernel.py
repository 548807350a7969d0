"""GEMM1 with gathered rows and its activation. One program a (row tile, block of activation columns).

Portable: pipelined 16-byte asynchronous copies of gathered rows and of weights, tensor cores by tl.dot.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.gemm.activation_device import Swiglu, activate, activate_gated_at
from moe.gemm.portable.tile_device import (
    Operands,
    Plan,
    columns_of_lanes,
    halves_of_lanes,
    load_bias,
    load_tile,
    multiply_rows,
    store_columns,
    stored_row_of_lane,
    weight_offsets,
)
from moe.gemm.prefetch_device import prefetch_weights


@triton.jit
def portable_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, an expert's weight after another
    out_ptr,  # [P, OUT_FEATURES] bf16
    kept_ptr,  # [P, 2 OUT_FEATURES] bf16 (not gated: [P, OUT_FEATURES]) for what is activated, or None
    token_of_row_ptr,  # [P] int32
    expert_of_tile_ptr,  # [P / BLOCK_M] int32
    row_limit_of_tile_ptr,  # [P / BLOCK_M] int32
    num_tiles_ptr,  # [1] int32
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    bias_ptr,  # [E_local, rows of the weight] bf16 or fp32, or None
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GATE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IS_SHUFFLED: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    USES_PDL: tl.constexpr,
    PREFETCH_PROGRAMS: tl.constexpr,  # so many prefetch weights before they wait
    THREADS: tl.constexpr,
):
    NUM_COLUMN_BLOCKS: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    BLOCK_W: tl.constexpr = 2 * BLOCK_N if IS_GATED else BLOCK_N
    WEIGHT_ROWS: tl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    program = tl.program_id(0)
    if PREFETCH_PROGRAMS:
        prefetch_weights(weights_ptr, program, PREFETCH_PROGRAMS, THREADS)
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(num_tiles_ptr)
    if program >= num_tiles * NUM_COLUMN_BLOCKS:
        return
    plan = Plan(expert_of_tile_ptr, row_limit_of_tile_ptr, num_tiles)
    tile = load_tile(plan, program, NUM_COLUMN_BLOCKS, GROUP_TILES, BLOCK_M)
    token = tl.load(token_of_row_ptr + tile.row, mask=tile.in_rows, other=0)

    HAS_HALVES: tl.constexpr = not (IS_SHUFFLED or IS_INTERLEAVED)
    stored_row, in_weights = stored_row_of_lane(
        tile.column_block * BLOCK_N, OUT_FEATURES, IS_GATED, HAS_HALVES, BLOCK_W
    )
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, tile.expert, stored_row, in_weights, WEIGHT_ROWS)
    # int64 first: all experts' weights, and the tokens of a long prefill, pass 2^31 elements.
    weights_ptr += tile.expert.to(tl.int64) * (WEIGHT_ROWS * IN_FEATURES)
    weight_ptrs = weights_ptr + weight_offsets(stored_row, ROW_STRIDE, K_STRIDE, BLOCK_STRIDE, BLOCK_K)
    row_ptrs = hidden_states_ptr + token.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_K)[None, :]
    operands = Operands(row_ptrs, tile.in_rows, weight_ptrs, in_weights)
    accumulators = multiply_rows(operands, IN_FEATURES, BLOCK_STRIDE, BLOCK_K, OUT_FEATURES % BLOCK_N == 0)
    if bias_ptr is not None:
        accumulators += bias[None, :]
    if IS_GATED:
        first, second = halves_of_lanes(accumulators, IS_SHUFFLED, IS_INTERLEAVED, BLOCK_M, BLOCK_W)
        gate = first if IS_GATE_FIRST else second
        up = second if IS_GATE_FIRST else first
        pointers = Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr)
        activated = activate_gated_at(gate, up, pointers, tile.expert, ACTIVATION)
        if kept_ptr is not None:
            store_columns(kept_ptr, first, tile, OUT_FEATURES, WEIGHT_ROWS)
            store_columns(kept_ptr + OUT_FEATURES, second, tile, OUT_FEATURES, WEIGHT_ROWS)
    else:
        product = columns_of_lanes(accumulators, IS_SHUFFLED, BLOCK_M, BLOCK_W)
        if kept_ptr is not None:
            store_columns(kept_ptr, product, tile, OUT_FEATURES, OUT_FEATURES)
        activated = activate(product, ACTIVATION)
    store_columns(out_ptr, activated, tile, OUT_FEATURES, OUT_FEATURES)
