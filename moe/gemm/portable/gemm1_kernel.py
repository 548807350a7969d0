"""GEMM1 with gathered rows and its activation. One program a (row tile, block of activation columns).

Portable: pipelined 16-byte asynchronous copies of gathered rows and of weights, tensor cores by tl.dot.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.gemm.activation_device import relu2, swiglu
from moe.gemm.portable.tile_device import (
    columns_of_lanes,
    halves_of_lanes,
    multiply_rows,
    stored_row_of_lane,
    tile_of_program,
    weight_offsets,
)
from moe.gemm.prefetch_device import prefetch_weights


@triton.jit
def portable_gemm1_kernel(
    hidden_states_ptr,  # [T, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, an expert's weight after another
    out_ptr,  # [P, OUT_FEATURES] bf16
    token_of_row_ptr,  # [P] int32
    expert_of_tile_ptr,  # [P / BLOCK_M] int32
    row_limit_of_tile_ptr,  # [P / BLOCK_M] int32
    num_tiles_ptr,  # [1] int32
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GATE_FIRST: tl.constexpr,
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
    tile, column_block = tile_of_program(program, num_tiles, NUM_COLUMN_BLOCKS, GROUP_TILES)
    expert = tl.load(expert_of_tile_ptr + tile)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < tl.load(row_limit_of_tile_ptr + tile)
    token = tl.load(token_of_row_ptr + row, mask=in_rows, other=0)

    first_column = column_block * BLOCK_N
    stored_row, in_weights = stored_row_of_lane(first_column, OUT_FEATURES, IS_GATED, IS_SHUFFLED, BLOCK_W)
    # int64 first: all experts' weights, and the tokens of a long prefill, pass 2^31 elements.
    weights_ptr += expert.to(tl.int64) * (WEIGHT_ROWS * IN_FEATURES)
    weight_ptrs = weights_ptr + weight_offsets(stored_row, ROW_STRIDE, K_STRIDE, BLOCK_STRIDE, BLOCK_K)
    row_ptrs = hidden_states_ptr + token.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_K)[None, :]
    accumulators = multiply_rows(
        row_ptrs,
        in_rows,
        weight_ptrs,
        in_weights,
        IN_FEATURES,
        BLOCK_STRIDE,
        BLOCK_M,
        BLOCK_W,
        BLOCK_K,
        OUT_FEATURES % BLOCK_N == 0,
    )
    if IS_GATED:
        first, second = halves_of_lanes(accumulators, IS_SHUFFLED, BLOCK_M, BLOCK_W)
        gate = first if IS_GATE_FIRST else second
        up = second if IS_GATE_FIRST else first
        activated = swiglu(gate, up, expert, alpha_ptr, beta_ptr, clamp_limit_ptr)
    else:
        activated = relu2(columns_of_lanes(accumulators, IS_SHUFFLED, BLOCK_M, BLOCK_W))

    column = first_column + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
    tl.store(out_ptrs, activated.to(tl.bfloat16), mask=in_rows[:, None] & (column < OUT_FEATURES)[None, :])
