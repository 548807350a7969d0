"""Weights of a tile of output columns, read where they lie in any WeightFormat, and the columns put back in order.

A program takes BLOCK_W rows of the stored weight, its lanes. Element (row, k) of an expert lies at

    row * ROW_STRIDE + k // 64 * BLOCK_STRIDE + k % 64 * K_STRIDE

which covers MajorK, MajorMn and BlockMajorK (`WeightStrides`). Lanes follow memory in runs of 8 rows at least, so that
layouts with neighbouring rows in neighbouring memory load 16 bytes at once:

    not gated                  lane c has row first_column + c
    gated                      lanes 16i .. 16i+7 have rows of the weight's first half, lanes 16i+8 .. 16i+15 the same
                               rows of its second half: gate and up of a column lie 8 lanes apart
    gated, shuffled            the shuffled rows have just that order: lane c has row 2 * first_column + c
    gated, interleaved         lane c has row 2 * first_column + c: gate and up of a column are neighbours

What shuffling did to the order of columns is undone on the accumulators, in registers.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Plan(NamedTuple):
    """Where row tiles lie."""

    expert_of_tile_ptr: Any  # [P / BLOCK_M] int32
    row_limit_of_tile_ptr: Any  # [P / BLOCK_M] int32
    num_tiles: Any


class Tile(NamedTuple):
    """What a program computes."""

    expert: Any
    row: Any  # [BLOCK_M] int32
    in_rows: Any  # [BLOCK_M] bool
    column_block: Any


class Operands(NamedTuple):
    """The first BLOCK_K elements of rows and of weights; what is in neither counts as zeros."""

    row_ptrs: Any  # [BLOCK_M, BLOCK_K]
    in_rows: Any  # [BLOCK_M] bool
    weight_ptrs: Any  # [BLOCK_K, BLOCK_W]
    in_weights: Any  # [BLOCK_W] bool


@triton.jit
def load_tile(
    plan,
    program,
    NUM_COLUMN_BLOCKS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The Tile of a program, given that program < num_tiles * NUM_COLUMN_BLOCKS."""
    tile, column_block = tile_of_program(program, plan.num_tiles, NUM_COLUMN_BLOCKS, GROUP_TILES)
    expert = tl.load(plan.expert_of_tile_ptr + tile)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < tl.load(plan.row_limit_of_tile_ptr + tile)
    return Tile(expert, row, in_rows, column_block)


@triton.jit
def tile_of_program(program, num_tiles, NUM_COLUMN_BLOCKS: tl.constexpr, GROUP_TILES: tl.constexpr):
    """(row tile, column block) of a program, given that program < num_tiles * NUM_COLUMN_BLOCKS.

    GROUP_TILES neighbouring row tiles take the same columns one after another, then the next columns. Row tiles of an
    expert are neighbours, so they read a block of its weights while it lies in L2, and the group's rows stay there too.
    """
    programs_of_group = GROUP_TILES * NUM_COLUMN_BLOCKS
    first_tile = program // programs_of_group * GROUP_TILES
    tiles_of_group = tl.minimum(num_tiles - first_tile, GROUP_TILES)
    program_in_group = program % programs_of_group
    return first_tile + program_in_group % tiles_of_group, program_in_group // tiles_of_group


@triton.jit
def stored_row_of_lane(
    first_column,
    OUT_FEATURES: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_HALVES: tl.constexpr,  # where gated: gate and up of a column lie OUT_FEATURES rows apart
    BLOCK_W: tl.constexpr,
):
    """Row of the stored weight for each lane, and whether there is one: ([BLOCK_W] int32, [BLOCK_W] bool)."""
    lane = tl.arange(0, BLOCK_W)
    if IS_GATED and HAS_HALVES:
        column = first_column + lane // 16 * 8 + lane % 8
        row = column + lane % 16 // 8 * OUT_FEATURES
        # The compiler cannot see that runs of 8 rows start at multiples of 8; a MajorMn layout loads by 16 bytes if told.
        return tl.multiple_of(tl.max_contiguous(row, 8), 8), column < OUT_FEATURES
    row = (2 * first_column if IS_GATED else first_column) + lane
    return row, row < (2 * OUT_FEATURES if IS_GATED else OUT_FEATURES)


@triton.jit
def weight_offsets(
    row,
    ROW_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_W] int32: where the first BLOCK_K elements of each row lie within an expert's weight."""
    k = tl.arange(0, BLOCK_K)
    return (k // 64 * BLOCK_STRIDE + k % 64 * K_STRIDE)[:, None] + (row * ROW_STRIDE)[None, :]


@triton.jit
def load_bias(bias_ptr, expert, stored_row, in_weights, WEIGHT_ROWS: tl.constexpr):
    """[BLOCK_W] fp32: the bias of each lane's row. Asked for before the products, so that nobody waits for it after them."""
    bias_ptr += expert.to(tl.int64) * WEIGHT_ROWS
    return tl.load(bias_ptr + stored_row, mask=in_weights, other=0.0).to(tl.float32)


@triton.jit
def halves_of_lanes(
    accumulators,
    IS_SHUFFLED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Products with the weight's first and second half, columns in order: two [BLOCK_M, BLOCK_W / 2]."""
    if IS_INTERLEAVED:
        return accumulators.reshape(BLOCK_M, BLOCK_W // 2, 2).split()
    runs = accumulators.reshape(BLOCK_M, BLOCK_W // 16, 2, 8).permute(0, 1, 3, 2)
    first, second = runs.split()  # [BLOCK_M, BLOCK_W / 16, 8]
    if IS_SHUFFLED:
        # A block of 32 rows holds even columns of 16 neighbours, then odd ones.
        first = first.reshape(BLOCK_M, BLOCK_W // 32, 2, 8).permute(0, 1, 3, 2)
        second = second.reshape(BLOCK_M, BLOCK_W // 32, 2, 8).permute(0, 1, 3, 2)
    return first.reshape(BLOCK_M, BLOCK_W // 2), second.reshape(BLOCK_M, BLOCK_W // 2)


@triton.jit
def columns_of_lanes(accumulators, IS_SHUFFLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Products with a weight that is not gated, columns in order: [BLOCK_M, BLOCK_W]."""
    if IS_SHUFFLED:
        # Row 8p + i of a block of 32 is column 4i + p.
        runs = accumulators.reshape(BLOCK_M, BLOCK_W // 32, 4, 8).permute(0, 1, 3, 2)
        accumulators = runs.reshape(BLOCK_M, BLOCK_W)
    return accumulators


@triton.jit
def multiply_rows(
    operands,
    IN_FEATURES: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN_W: tl.constexpr,  # all weights are in
):
    """[BLOCK_M, BLOCK_W] fp32: rows times the transposed weights, over all IN_FEATURES."""
    row_ptrs, in_rows, weight_ptrs, in_weights = operands
    k = tl.arange(0, BLOCK_K)
    accumulators = tl.zeros((row_ptrs.shape[0], weight_ptrs.shape[1]), tl.float32)
    for first_k in tl.range(0, IN_FEATURES, BLOCK_K):
        if IN_FEATURES % BLOCK_K:
            # Weights past the end are masked too: zero times garbage may be NaN.
            in_k = k < IN_FEATURES - first_k
            rows = tl.load(row_ptrs, mask=in_rows[:, None] & in_k[None, :], other=0.0)
            weights = tl.load(weight_ptrs, mask=in_k[:, None] & in_weights[None, :], other=0.0)
        else:
            rows = tl.load(row_ptrs, mask=in_rows[:, None], other=0.0)
            weights = tl.load(
                weight_ptrs, mask=None if IS_EVEN_W else in_weights[None, :], other=None if IS_EVEN_W else 0.0
            )
        accumulators = tl.dot(rows, weights, accumulators)
        row_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // 64 * BLOCK_STRIDE
    return accumulators


@triton.jit
def store_columns(out_ptr, values, tile, OUT_FEATURES: tl.constexpr, ROW_STRIDE: tl.constexpr):
    """Write a tile's [BLOCK_M, BLOCK_N] values, rounded to bf16, to rows that are ROW_STRIDE elements apart."""
    BLOCK_N: tl.constexpr = values.shape[1]
    column = tile.column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # int64: rows of a long prefill pass 2^31 elements.
    out_ptrs = out_ptr + tile.row.to(tl.int64)[:, None] * ROW_STRIDE + column[None, :]
    mask = tile.in_rows[:, None] & (column < OUT_FEATURES)[None, :]
    tl.store(out_ptrs, values.to(tl.bfloat16), mask=mask)
