"""GEMM2 over permuted rows. One program a (row tile, block of output columns)."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.gemm.portable.tile_device import (
    Operands,
    Plan,
    columns_of_lanes,
    load_bias,
    load_tile,
    multiply_rows,
    store_columns,
    stored_row_of_lane,
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
    bias_ptr,  # [E_local, OUT_FEATURES] bf16 or fp32, or None
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
    plan = Plan(expert_of_tile_ptr, row_limit_of_tile_ptr, num_tiles)
    tile = load_tile(plan, program, NUM_COLUMN_BLOCKS, GROUP_TILES, BLOCK_M)

    stored_row, in_weights = stored_row_of_lane(tile.column_block * BLOCK_N, OUT_FEATURES, False, False, BLOCK_N)
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, tile.expert, stored_row, in_weights, OUT_FEATURES)
    # int64 first: all experts' weights, and the rows of a long prefill, pass 2^31 elements.
    weights_ptr += tile.expert.to(tl.int64) * (OUT_FEATURES * IN_FEATURES)
    weight_ptrs = weights_ptr + weight_offsets(stored_row, ROW_STRIDE, K_STRIDE, BLOCK_STRIDE, BLOCK_K)
    row_ptrs = rows_ptr + tile.row.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_K)[None, :]
    operands = Operands(row_ptrs, tile.in_rows, weight_ptrs, in_weights)
    accumulators = multiply_rows(operands, IN_FEATURES, BLOCK_STRIDE, BLOCK_K, OUT_FEATURES % BLOCK_N == 0)
    if bias_ptr is not None:
        accumulators += bias[None, :]
    product = columns_of_lanes(accumulators, IS_SHUFFLED, BLOCK_M, BLOCK_N)
    store_columns(out_ptr, product, tile, OUT_FEATURES, OUT_FEATURES)
