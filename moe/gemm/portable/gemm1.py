"""Stage 3: gather each row's token, multiply by its expert's W1, apply the activation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm.checks import check_gather
from moe.gemm.config import GemmConfig
from moe.gemm.portable.gemm1_kernel import portable_gemm1_kernel
from moe.gemm.portable.tile import launch_tile
from moe.gemm.prefetch import prefetches
from moe.gemm.weight_format import weight_strides
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.device import num_sms
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel


def portable_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """activation(hidden_states[token_of_row] @ W1[expert_of_row]^T + bias), without a permuted copy of the hidden states.

    Args:
        hidden_states: [T, H] bf16.
        weights: bf16, config.weight_shape, as config.weight_format says.
        permutation: where rows lie; a program takes permutation.tile_rows of them.
        swiglu: parameters of the activation by local expert, [E_local] fp32 each.
        bias: [E_local, rows of an expert's weight] bf16 or float32, in the order of those rows, added to the fp32 products.
        uses_pdl: the launch is a dependent one of the launch before it (`moe.runtime.dependent_launch`), where the GPU has them.

    Returns:
        [P, I] bf16, rounded once, from the fp32 activation. Padding rows are uninitialised memory.

    Raises:
        ValueError: where a tensor does not fit the config.
    """
    check_gather(config, hidden_states, weights, permutation, swiglu, bias)
    return launch_portable_gemm1(
        hidden_states, weights, permutation, config=config, swiglu=swiglu, bias=bias, uses_pdl=uses_pdl
    )


def launch_portable_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """`portable_gemm1` of tensors that were checked.

    Args:
        kept: [P, 2I] bf16 (not gated: [P, I]), into which what is activated is written too, columns as the rows of W1.
    """
    out = new_scratch(hidden_states, (permutation.max_rows, config.out_features))
    if not out.numel():
        return out
    uses_pdl = uses_pdl and launches_dependents(hidden_states.device)
    num_prefetching = num_sms(hidden_states.device)
    if not prefetches(config, permutation, num_prefetching, uses_pdl=uses_pdl):
        num_prefetching = 0
    kernel, num_columns = _kernel_of(config, permutation.tile_rows, hidden_states.device, uses_pdl, num_prefetching)
    alpha, beta, clamp_limit = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
    kernel.launch(
        (permutation.max_tiles * num_columns, 1, 1),
        hidden_states,
        weights,
        out,
        kept,
        permutation.token_of_row,
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_tiles,
        alpha,
        beta,
        clamp_limit,
        bias,
    )
    return out


@functools.cache
def _kernel_of(
    config: GemmConfig, tile_rows: int, device: torch.device, uses_pdl: bool, num_prefetching: int
) -> tuple[TritonKernel, int]:
    """The kernel of a config, and how many programs share a tile of rows."""
    tile = launch_tile(config, tile_rows, device)
    strides = weight_strides(config)
    kernel = TritonKernel(
        portable_gemm1_kernel,
        IN_FEATURES=config.in_features,
        OUT_FEATURES=config.out_features,
        ACTIVATION=config.activation_name,
        IS_GATED=config.is_gated,
        IS_GATE_FIRST=config.weight_format.is_gate_first,
        IS_INTERLEAVED=config.is_interleaved,
        IS_SHUFFLED=config.weight_format.is_shuffled,
        ROW_STRIDE=strides.row,
        K_STRIDE=strides.k,
        BLOCK_STRIDE=strides.block,
        BLOCK_M=tile_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_TILES=tile.group_tiles,
        USES_PDL=uses_pdl,
        PREFETCH_PROGRAMS=num_prefetching,
        THREADS=32 * tile.num_warps,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=uses_pdl,
    )
    return kernel, -(-config.out_features // tile.block_n)
