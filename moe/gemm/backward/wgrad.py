"""Gradients of W1 and W2, on every GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.backward.checks import check_gemm1_wgrad, check_gemm2_wgrad
from moe.gemm.backward.wgrad_kernel import portable_wgrad_kernel, rows_of_experts_kernel
from moe.gemm.config import GemmConfig, WeightLayout
from moe.gemm.portable.tile import BARRIER_BYTES, BYTES_PER_ELEMENT
from moe.runtime.device import HOPPER_SHARED_BYTES, shared_memory_limit
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

MAX_CHUNK = 1024  # tiles that `rows_of_experts` takes at a time
BLOCK_K = 64  # rows of an expert
STAGES_OF_TOKENS = 2  # of the pipeline, in which no rows are there yet: tokens are loaded before their rows can be
MAX_STAGES = 6
CLEARING_PROGRAMS = 8  # an expert
CLEARED_AT_ONCE = 4096  # elements


class WgradTile(NamedTuple):
    """What one program computes of an expert's gradient, and with how much hardware."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Sides(NamedTuple):
    """The product left^T right of each expert's rows, as the stored weight has its axes."""

    left: Tensor
    right: Tensor
    is_left_gathered: (
        bool  # whether `left` is rows of tokens and `right` rows of the permutation, or the other way round
    )


def portable_gemm1_wgrad(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W1; arguments, result and errors as `gemm1_wgrad_reference`. Padding rows are not read."""
    check_gemm1_wgrad(config, grad_gate_up, hidden_states, permutation, out)
    return launch_portable_gemm1_wgrad(grad_gate_up, hidden_states, permutation, config=config, out=out)


def launch_portable_gemm1_wgrad(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """`portable_gemm1_wgrad` of tensors that were checked."""
    is_transposed = config.weight_format.layout is WeightLayout.MajorMn
    sides = Sides(hidden_states, grad_gate_up, True) if is_transposed else Sides(grad_gate_up, hidden_states, False)
    return _launch(sides, permutation, config, out)


def portable_gemm2_wgrad(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of W2; arguments, result and errors as `gemm2_wgrad_reference`. Padding rows are not read."""
    check_gemm2_wgrad(config, grad_output, weighted_activation, permutation, out)
    return launch_portable_gemm2_wgrad(grad_output, weighted_activation, permutation, config=config, out=out)


def launch_portable_gemm2_wgrad(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """`portable_gemm2_wgrad` of tensors that were checked."""
    is_transposed = config.weight_format.layout is WeightLayout.MajorMn
    sides = (
        Sides(weighted_activation, grad_output, False)
        if is_transposed
        else Sides(grad_output, weighted_activation, True)
    )
    return _launch(sides, permutation, config, out)


def _launch(sides: Sides, permutation: Permutation, config: GemmConfig, out: Tensor | None) -> Tensor:
    grad = new_scratch(sides.left, config.weight_shape) if out is None else out
    kernel, num_programs = _kernel_of(
        config.num_experts,
        sides.left.shape[1],
        sides.right.shape[1],
        sides.is_left_gathered,
        out is not None,
        sides.left.device,
    )
    rows_of_expert = rows_of_experts(permutation, config.num_experts)
    tensors = (sides.left, sides.right, grad, permutation.token_of_row, rows_of_expert)
    kernel.launch((num_programs, 1, 1), *tensors)
    return grad


def rows_of_experts(permutation: Permutation, num_experts: int, cleared: Tensor | None = None) -> Tensor:
    """[2 E_local + 1] int32 on the device: each expert's first row, one past each one's last real one (0 and 0 where it has none).

    Then a 0, for a kernel to count with.

    Args:
        cleared: [E_local, ..] bf16 that receives zeros for experts without rows.
    """
    rows = new_scratch(permutation.expert_of_tile, (2 * num_experts + 1,))
    size = 0 if cleared is None else cleared.numel() // num_experts
    kernel, num_programs = _finder_of(num_experts, permutation.tile_rows, permutation.max_tiles, size)
    maps = (permutation.expert_of_tile, permutation.row_limit_of_tile, permutation.num_tiles)
    kernel.launch((num_programs, 1, 1), *maps, rows, cleared)
    return rows


@functools.lru_cache(maxsize=1024)
def _finder_of(num_experts: int, tile_rows: int, max_tiles: int, size: int) -> tuple[TritonKernel, int]:
    """The kernel, and its programs."""
    chunk = min(MAX_CHUNK, triton.next_power_of_2(max(max_tiles, 1)))
    programs = min(CLEARING_PROGRAMS, max(-(-size // CLEARED_AT_ONCE), 1))
    return _kept_finder_of(num_experts, tile_rows, chunk, size, programs), num_experts * programs


@functools.cache
def _kept_finder_of(num_experts: int, tile_rows: int, chunk: int, size: int, programs: int) -> TritonKernel:
    return TritonKernel(
        rows_of_experts_kernel,
        NUM_EXPERTS=num_experts,
        TILE_ROWS=tile_rows,
        CHUNK=chunk,
        SIZE=size,
        PROGRAMS=programs,
        BLOCK=CLEARED_AT_ONCE,
        num_warps=4,
    )


@functools.cache
def _kernel_of(
    num_experts: int,
    left_features: int,
    right_features: int,
    is_left_gathered: bool,
    is_sum: bool,
    device: torch.device,
) -> tuple[TritonKernel, int]:
    """The kernel of a gradient [E, left_features, right_features], and its programs."""
    tile = wgrad_tile(left_features, right_features, shared_memory_limit(device))
    kernel = TritonKernel(
        portable_wgrad_kernel,
        NUM_EXPERTS=num_experts,
        LEFT_FEATURES=left_features,
        RIGHT_FEATURES=right_features,
        IS_LEFT_GATHERED=is_left_gathered,
        IS_SUM=is_sum,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return kernel, num_experts * -(-left_features // tile.block_m) * -(-right_features // tile.block_n)


def wgrad_tile(left_features: int, right_features: int, shared_bytes: int = HOPPER_SHARED_BYTES) -> WgradTile:
    """128 x 128, as wide as registers hold beside the addresses of rows, and no wider than the gradient."""
    block_m, block_n = (
        max(16, min(128, 1 << (features - 1).bit_length())) for features in (left_features, right_features)
    )
    num_buffers = (shared_bytes - BARRIER_BYTES) // ((block_m + block_n) * BLOCK_K * BYTES_PER_ELEMENT)
    return WgradTile(
        block_m,
        block_n,
        num_warps=8 if block_m * block_n > 64 * 128 else 4,
        num_stages=min(MAX_STAGES, num_buffers + STAGES_OF_TOKENS),
    )
