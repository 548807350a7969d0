"""GEMM2 over permuted rows. One program a (row tile, block of output columns)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.gemm.portable.tile_device import (
    columns_of_lanes,
    multiply_rows,
    stored_row_of_lane,
    tile_of_program,
    weight_offsets,
)


@triton.jit
def portable_gemm2_kernel(
    rows_ptr,  # [P, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, an expert's weight after another
    out_ptr,  # [P, OUT_FEATURES] bf16
    expert_of_tile_ptr,  # [P / BLOCK_M] int32
    row_limit_of_tile_ptr,  # [P / BLOCK_M] int32
    num_tiles_ptr,  # [1] int32
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IS_SHUFFLED: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    USES_PDL: tl.constexpr,
):
    NUM_COLUMN_BLOCKS: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    num_tiles = tl.load(num_tiles_ptr)
    if program >= num_tiles * NUM_COLUMN_BLOCKS:
        return
    tile, column_block = tile_of_program(program, num_tiles, NUM_COLUMN_BLOCKS, GROUP_TILES)
    expert = tl.load(expert_of_tile_ptr + tile)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < tl.load(row_limit_of_tile_ptr + tile)

    first_column = column_block * BLOCK_N
    stored_row, in_weights = stored_row_of_lane(first_column, OUT_FEATURES, False, IS_SHUFFLED, BLOCK_N)
    # int64 first: all experts' weights, and the rows of a long prefill, pass 2^31 elements.
    weights_ptr += expert.to(tl.int64) * (OUT_FEATURES * IN_FEATURES)
    weight_ptrs = weights_ptr + weight_offsets(stored_row, ROW_STRIDE, K_STRIDE, BLOCK_STRIDE, BLOCK_K)
    row_ptrs = rows_ptr + row.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_K)[None, :]
    accumulators = multiply_rows(
        row_ptrs,
        in_rows,
        weight_ptrs,
        in_weights,
        IN_FEATURES,
        BLOCK_STRIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        OUT_FEATURES % BLOCK_N == 0,
    )
    product = columns_of_lanes(accumulators, IS_SHUFFLED, BLOCK_M, BLOCK_N)

    column = first_column + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
    tl.store(out_ptrs, product.to(tl.bfloat16), mask=in_rows[:, None] & (column < OUT_FEATURES)[None, :])
