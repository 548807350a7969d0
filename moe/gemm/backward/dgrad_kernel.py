"""The gradient through GEMM2, the routing weight and the activation. One program a (row tile, block of activation columns).

Portable: what `moe/gemm/portable` does with a weight that lies the other way, and an epilogue that reads what gemm1 kept.
"""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moe.gemm.activation_device import Swiglu, swiglu_of_expert
from moe.gemm.backward.activation_device import differentiate, differentiate_gated
from moe.gemm.portable.tile_device import (
    Operands,
    Plan,
    load_tile,
    multiply_rows,
    stored_row_of_lane,
    weight_offsets,
)


@triton.jit(do_not_specialize=["max_rows"])
def portable_gemm2_dgrad_kernel(
    grad_output_ptr,  # [T, IN_FEATURES] bf16
    weights_ptr,  # [E_local, ...] bf16, W2 of an expert after another
    gate_up_ptr,  # [P, 2 OUT_FEATURES] bf16, or [P, OUT_FEATURES] where not gated
    grad_gate_up_ptr,  # the same shape
    weighted_ptr,  # [P, OUT_FEATURES] bf16
    row_sums_ptr,  # [column blocks, P] fp32
    weight_of_row_ptr,  # [P] fp32
    token_of_row_ptr,  # [P] int32
    expert_of_tile_ptr,  # [P / BLOCK_M] int32
    row_limit_of_tile_ptr,  # [P / BLOCK_M] int32
    num_tiles_ptr,  # [1] int32
    alpha_ptr,  # [E_local] fp32 or None, as the two that follow
    beta_ptr,
    clamp_limit_ptr,
    max_rows,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GATE_FIRST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    NUM_COLUMN_BLOCKS: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    num_tiles = tl.load(num_tiles_ptr)
    if program >= num_tiles * NUM_COLUMN_BLOCKS:
        return
    plan = Plan(expert_of_tile_ptr, row_limit_of_tile_ptr, num_tiles)
    tile = load_tile(plan, program, NUM_COLUMN_BLOCKS, GROUP_TILES, BLOCK_M)
    token = tl.load(token_of_row_ptr + tile.row, mask=tile.in_rows, other=0)

    stored_row, in_weights = stored_row_of_lane(tile.column_block * BLOCK_N, OUT_FEATURES, False, False, BLOCK_N)
    # int64 first: all experts' weights, and the tokens of a long sequence, pass 2^31 elements.
    weights_ptr += tile.expert.to(tl.int64) * (OUT_FEATURES * IN_FEATURES)
    weight_ptrs = weights_ptr + weight_offsets(stored_row, ROW_STRIDE, K_STRIDE, BLOCK_STRIDE, BLOCK_K)
    row_ptrs = grad_output_ptr + token.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_K)[None, :]
    operands = Operands(row_ptrs, tile.in_rows, weight_ptrs, in_weights)
    grad = multiply_rows(operands, IN_FEATURES, BLOCK_STRIDE, BLOCK_K, OUT_FEATURES % BLOCK_N == 0)

    weight = tl.load(weight_of_row_ptr + tile.row, mask=tile.in_rows, other=0.0)[:, None]
    parameters = swiglu_of_expert(Swiglu(alpha_ptr, beta_ptr, clamp_limit_ptr), tile.expert)
    arrays = Arrays(gate_up_ptr, grad_gate_up_ptr, weighted_ptr)
    # Half of the columns at a time: gate, up and what becomes of them want registers.
    left, right = grad.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    first_column = tile.column_block * BLOCK_N
    sums = finish_columns(
        arrays,
        left,
        weight,
        parameters,
        tile,
        first_column,
        OUT_FEATURES,
        ACTIVATION,
        IS_GATED,
        IS_GATE_FIRST,
        clamp_limit_ptr is not None,
    )
    first_column += BLOCK_N // 2
    sums += finish_columns(
        arrays,
        right,
        weight,
        parameters,
        tile,
        first_column,
        OUT_FEATURES,
        ACTIVATION,
        IS_GATED,
        IS_GATE_FIRST,
        clamp_limit_ptr is not None,
    )
    row_sums_ptr += tile.column_block.to(tl.int64) * max_rows
    tl.store(row_sums_ptr + tile.row, sums, mask=tile.in_rows)


class Arrays(NamedTuple):
    """What is read and written beside the product."""

    gate_up_ptr: Any
    grad_gate_up_ptr: Any
    weighted_ptr: Any


@triton.jit
def finish_columns(
    arrays,
    grad,  # [BLOCK_M, columns] fp32, of the activation
    weight,
    parameters,
    tile,
    first_column,
    OUT_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GATE_FIRST: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
):
    """Write some columns' gradients and weighted activations; [BLOCK_M] of grad times activation, summed over them."""
    ROW_STRIDE: tl.constexpr = 2 * OUT_FEATURES if IS_GATED else OUT_FEATURES
    column = first_column + tl.arange(0, grad.shape[1])
    in_columns = (column < OUT_FEATURES)[None, :]
    mask = tile.in_rows[:, None] & in_columns
    # int64: rows of a long sequence pass 2^31 elements.
    row = tile.row.to(tl.int64)[:, None]
    offsets = row * ROW_STRIDE + column[None, :]
    weighted_grad = weight * grad
    # What is stored in padding rows are exact zeros.
    if IS_GATED:
        first = tl.load(arrays.gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(arrays.gate_up_ptr + OUT_FEATURES + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = first if IS_GATE_FIRST else second
        up = second if IS_GATE_FIRST else first
        value, by_gate, by_up = differentiate_gated(gate, up, parameters, ACTIVATION, IS_CLAMPED)
        by_first = by_gate if IS_GATE_FIRST else by_up
        by_second = by_up if IS_GATE_FIRST else by_gate
        store_or_zeros(arrays.grad_gate_up_ptr + offsets, weighted_grad * by_first, tile.in_rows, in_columns)
        second_ptrs = arrays.grad_gate_up_ptr + OUT_FEATURES + offsets
        store_or_zeros(second_ptrs, weighted_grad * by_second, tile.in_rows, in_columns)
    else:
        product = tl.load(arrays.gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value, slope = differentiate(product, ACTIVATION)
        store_or_zeros(arrays.grad_gate_up_ptr + offsets, weighted_grad * slope, tile.in_rows, in_columns)
    weighted_ptrs = arrays.weighted_ptr + row * OUT_FEATURES + column[None, :]
    store_or_zeros(weighted_ptrs, weight * value, tile.in_rows, in_columns)
    # Past the last column weights count as zeros, and so does the gradient there.
    return tl.sum(grad * value, 1)


@triton.jit
def store_or_zeros(ptrs, values, in_rows, in_columns):
    """Round to bf16, with exact zeros in padding rows."""
    tl.store(ptrs, tl.where(in_rows[:, None], values, 0.0).to(tl.bfloat16), mask=in_columns)
