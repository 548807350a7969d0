"""Gradients of rows, on every GPU: through gemm2 and the activation, and through gemm1."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Gemm2Gradients, Permutation, SwigluParams, TopK
from moe.gemm.backward.checks import check_gemm1_dgrad, check_gemm2_dgrad
from moe.gemm.backward.dgrad_kernel import portable_gemm2_dgrad_kernel
from moe.gemm.backward.row_sums import sums_of_slots, weigh_rows
from moe.gemm.backward.transposed import transposed
from moe.gemm.config import GemmConfig, GemmTile
from moe.gemm.portable.gemm2 import launch_portable_gemm2
from moe.gemm.portable.tile import DECODE_ROWS, fit_stages
from moe.gemm.weight_format import weight_strides
from moe.runtime.device import shared_memory_limit
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel


def portable_gemm1_dgrad(
    grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig
) -> Tensor:
    """grad_gate_up @ W1[expert_of_row]; arguments, result and errors as `gemm1_dgrad_reference`. Padding rows are not written."""
    check_gemm1_dgrad(config, grad_gate_up, weights, permutation)
    return launch_portable_gemm1_dgrad(grad_gate_up, weights, permutation, config=config)


def launch_portable_gemm1_dgrad(
    grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig
) -> Tensor:
    """`portable_gemm1_dgrad` of tensors that were checked."""
    return launch_portable_gemm2(grad_gate_up, weights, permutation, config=transposed(config))


def portable_gemm2_dgrad(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Gemm2Gradients:
    """Gradients through gemm2, the routing weight and the activation; arguments, result and errors as `gemm2_dgrad_reference`."""
    check_gemm2_dgrad(config, gemm1, grad_output, weights, gate_up, topk, permutation, swiglu)
    return launch_portable_gemm2_dgrad(
        grad_output, weights, gate_up, topk, permutation, config=config, gemm1=gemm1, swiglu=swiglu
    )


def launch_portable_gemm2_dgrad(
    grad_output: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    topk: TopK,
    permutation: Permutation,
    *,
    config: GemmConfig,
    gemm1: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Gemm2Gradients:
    """`portable_gemm2_dgrad` of tensors that were checked."""
    kernel, num_columns = _kernel_of(config, gemm1, permutation.tile_rows, grad_output.device)
    grad_gate_up = new_scratch(gate_up, tuple(gate_up.shape))
    weighted = new_scratch(gate_up, (permutation.max_rows, config.in_features))
    row_sums = new_scratch(gate_up, (num_columns, permutation.max_rows), torch.float32)
    alpha, beta, clamp_limit = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
    if permutation.max_rows:
        kernel.launch(
            (permutation.max_tiles * num_columns, 1, 1),
            grad_output,
            weights,
            gate_up,
            grad_gate_up,
            weighted,
            row_sums,
            weigh_rows(topk.weights, permutation),
            permutation.token_of_row,
            permutation.expert_of_tile,
            permutation.row_limit_of_tile,
            permutation.num_tiles,
            alpha,
            beta,
            clamp_limit,
            numbers=(permutation.max_rows,),
        )
    return Gemm2Gradients(grad_gate_up, weighted, sums_of_slots(row_sums, permutation))


@functools.cache
def _kernel_of(config: GemmConfig, gemm1: GemmConfig, tile_rows: int, device: torch.device) -> tuple[TritonKernel, int]:
    """The kernel of a layer's two configs, and how many programs share a tile of rows."""
    back = transposed(config)
    tile = dgrad_tile(back, tile_rows, shared_memory_limit(device))
    strides = weight_strides(back)
    kernel = TritonKernel(
        portable_gemm2_dgrad_kernel,
        IN_FEATURES=back.in_features,
        OUT_FEATURES=back.out_features,
        ACTIVATION=gemm1.activation_name,
        IS_GATED=gemm1.is_gated,
        IS_GATE_FIRST=gemm1.weight_format.is_gate_first,
        ROW_STRIDE=strides.row,
        K_STRIDE=strides.k,
        BLOCK_STRIDE=strides.block,
        BLOCK_M=tile_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_TILES=tile.group_tiles,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return kernel, -(-back.out_features // tile.block_n)


def dgrad_tile(back: GemmConfig, tile_rows: int, shared_bytes: int) -> GemmTile:
    """Half as wide as a forward tile of many rows, as gate, up and their gradients want registers beside the accumulators."""
    columns = 64 if tile_rows <= DECODE_ROWS else 128
    block_n = max(16, min(columns, 1 << (back.out_features - 1).bit_length()))
    tile = GemmTile(block_n=block_n, block_k=64, num_warps=8 if tile_rows == 128 else 4, num_stages=4)
    return fit_stages(back, tile, tile_rows, shared_bytes)
