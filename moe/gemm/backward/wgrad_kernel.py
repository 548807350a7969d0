"""Gradients of weights: for each expert, a sum of outer products over its rows. One program a block of one expert's gradient.

One of two operands is rows of tokens, gathered; the other is rows of the permutation.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def portable_wgrad_kernel(
    left_ptr,  # [T, LEFT_FEATURES] or [P, LEFT_FEATURES] bf16
    right_ptr,  # [P, RIGHT_FEATURES] or [T, RIGHT_FEATURES] bf16
    out_ptr,  # [E_local, LEFT_FEATURES, RIGHT_FEATURES] bf16; or fp32, which is added to
    token_of_row_ptr,  # [P] int32
    rows_of_expert_ptr,  # [2, E_local] int32: first row, one past the last real row
    NUM_EXPERTS: tl.constexpr,
    LEFT_FEATURES: tl.constexpr,
    RIGHT_FEATURES: tl.constexpr,
    IS_LEFT_GATHERED: tl.constexpr,
    IS_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LEFT_BLOCKS: tl.constexpr = (LEFT_FEATURES + BLOCK_M - 1) // BLOCK_M
    RIGHT_BLOCKS: tl.constexpr = (RIGHT_FEATURES + BLOCK_N - 1) // BLOCK_N
    # Blocks of one expert are neighbours: its rows are read from L2 but for the first time.
    program = tl.program_id(0)
    expert = program // (LEFT_BLOCKS * RIGHT_BLOCKS)
    block = program % (LEFT_BLOCKS * RIGHT_BLOCKS)
    left = block % LEFT_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    right = block // LEFT_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    in_left, in_right = left < LEFT_FEATURES, right < RIGHT_FEATURES
    first_row = tl.load(rows_of_expert_ptr + expert)
    limit = tl.load(rows_of_expert_ptr + NUM_EXPERTS + expert)
    accumulators = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step_row in tl.range(first_row, limit, BLOCK_K):
        row = step_row + tl.arange(0, BLOCK_K)
        in_rows = row < limit
        # int64: rows and tokens of a long sequence pass 2^31 elements.
        token = tl.load(token_of_row_ptr + row, mask=in_rows, other=0).to(tl.int64)
        left_row = token if IS_LEFT_GATHERED else row.to(tl.int64)
        right_row = row.to(tl.int64) if IS_LEFT_GATHERED else token
        left_ptrs = left_ptr + left_row[:, None] * LEFT_FEATURES + left[None, :]
        right_ptrs = right_ptr + right_row[:, None] * RIGHT_FEATURES + right[None, :]
        left_rows = tl.load(left_ptrs, mask=in_rows[:, None] & in_left[None, :], other=0.0)
        right_rows = tl.load(right_ptrs, mask=in_rows[:, None] & in_right[None, :], other=0.0)
        accumulators = tl.dot(tl.trans(left_rows), right_rows, accumulators)
    out_ptrs = out_ptr + expert.to(tl.int64) * (LEFT_FEATURES * RIGHT_FEATURES)
    out_ptrs += left.to(tl.int64)[:, None] * RIGHT_FEATURES + right[None, :]
    mask = in_left[:, None] & in_right[None, :]
    if IS_SUM:
        # Without rows there is nothing to add.
        mask &= first_row < limit
        tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + accumulators, mask=mask)
    else:
        tl.store(out_ptrs, accumulators.to(tl.bfloat16), mask=mask)


@triton.jit
def rows_of_experts_kernel(
    expert_of_tile_ptr,  # [P / TILE_ROWS] int32
    row_limit_of_tile_ptr,  # [P / TILE_ROWS] int32
    num_tiles_ptr,  # [1] int32
    rows_of_expert_ptr,  # [2, NUM_EXPERTS] int32, and one more
    cleared_ptr,  # [NUM_EXPERTS, SIZE] bf16, or None
    NUM_EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,  # an expert
    BLOCK: tl.constexpr,
):
    """An expert's first row and one past its last real row; where it has none 0 and 0, and its part of `cleared` is zeros.

    Then a 0, behind all experts. Each program looks for its expert among all tiles, rather than wait for one that does.
    """
    expert = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    num_tiles = tl.load(num_tiles_ptr)
    first_tile = num_tiles
    for first in range(0, num_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        expert_of_tile = tl.load(expert_of_tile_ptr + tile, mask=tile < num_tiles, other=-1)
        first_tile = tl.minimum(first_tile, tl.min(tl.where(expert_of_tile == expert, tile, num_tiles)))
    has_rows = first_tile < num_tiles
    if part == 0:
        limit = tl.load(row_limit_of_tile_ptr + first_tile, mask=has_rows, other=0)
        tl.store(rows_of_expert_ptr + expert, tl.where(has_rows, first_tile * TILE_ROWS, 0))
        tl.store(rows_of_expert_ptr + NUM_EXPERTS + expert, limit)
        if expert == 0:
            tl.store(rows_of_expert_ptr + 2 * NUM_EXPERTS, 0)
    if cleared_ptr is not None:  # noqa: SIM102 - known when it is compiled, the other on the device
        if not has_rows:
            expert_ptr = cleared_ptr + expert.to(tl.int64) * SIZE  # all experts' elements pass 2^31
            for first in range(part * BLOCK, SIZE, PROGRAMS * BLOCK):
                element = first + tl.arange(0, BLOCK)
                tl.store(expert_ptr + element, 0.0, mask=element < SIZE)
