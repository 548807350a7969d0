"""Stage 3 on Hopper, for loads of many rows an expert."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm.checks import check_gather
from moe.gemm.config import ACTIVATIONS, GemmConfig, WeightLayout, named_activations
from moe.gemm.hopper.boxes import half_row_boxes, row_boxes
from moe.gemm.hopper.problem import MAX_REGISTERS, num_blocks
from moe.gemm.hopper.work_units import units_of
from moe.gemm.wide.gemm1_kernel import wide_gemm1_kernel
from moe.gemm.wide.tile import HALF_ROWS, WIDE_UNITS, fits_wide, skips_tails, weight_row_boxes
from moe.runtime.device import is_hopper
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

BLOCK_W = 256  # rows of the weight
STORE_N = 128  # columns of the result that are written at a time


def block_n(config: GemmConfig) -> int:
    """Columns of the result that a piece of work has."""
    return BLOCK_W // 2 if config.is_gated else BLOCK_W


def takes(config: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """Whether `wide_gemm1` computes this: a contraction of more than 64, tile_rows 64 or 128, any weights but shuffled MajorMn."""
    return (
        is_hopper(device) and config.activation in ACTIVATIONS["wide"] and fits_wide(config, tile_rows, block_n(config))
    )


def wide_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    is_dynamic: bool = True,
    uses_pdl: bool = False,
) -> Tensor:
    """activation(hidden_states[token_of_row] @ W1[expert_of_row]^T + bias); arguments and result as `portable_gemm1`.

    Args:
        is_dynamic: blocks take the next piece of work as they finish one, rather than every n-th.
        uses_pdl: the launch is a dependent one of the launch before it (`moe.runtime.dependent_launch`).

    Raises:
        ValueError: where a tensor does not fit the config, or the kernel does not take the config.
    """
    check_gather(config, hidden_states, weights, permutation, swiglu, bias)
    if not (config.activation in ACTIVATIONS["wide"] and fits_wide(config, permutation.tile_rows, block_n(config))):
        raise ValueError(
            f"wide_gemm1: expected {named_activations(family='wide')}, a contraction of more than 64, "
            f"tile_rows of 64 or 128 and no shuffled MajorMn weights; "
            f"got {config!r} and tile_rows={permutation.tile_rows}; use portable_gemm1"
        )
    return launch_wide_gemm1(
        hidden_states,
        weights,
        permutation,
        config=config,
        swiglu=swiglu,
        bias=bias,
        is_dynamic=is_dynamic,
        uses_pdl=uses_pdl,
    )


def launch_wide_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    is_dynamic: bool = True,
    uses_pdl: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """`wide_gemm1` of tensors that were checked, where `takes` says that it computes this.

    Args:
        kept: [P, 2I] bf16, into which what is activated is written too, columns as the rows of W1, which is not shuffled.
    """
    out = new_scratch(hidden_states, (permutation.max_rows, config.out_features))
    if not out.numel():
        return out
    units = units_of(permutation, WIDE_UNITS, uses_pdl=uses_pdl)
    alpha, beta, clamp_limit = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
    _kernel_of(config, skips_tails(config, permutation.tile_rows), is_dynamic, uses_pdl).launch(
        (num_blocks(units, config, block_n(config)), 1, 1),
        hidden_states,
        weight_row_boxes(weights, config, BLOCK_W // 2),
        row_boxes(out, HALF_ROWS, STORE_N),
        *((None, None) if kept is None else half_row_boxes(kept, HALF_ROWS, STORE_N)),
        permutation.token_of_row,
        units.records,
        units.counts,
        alpha,
        beta,
        clamp_limit,
        bias,
        numbers=(units.max_units,),
    )
    return out


@functools.cache
def _kernel_of(config: GemmConfig, skips_tails: bool, is_dynamic: bool, uses_pdl: bool) -> TritonKernel:
    return TritonKernel(
        wide_gemm1_kernel,
        IN_FEATURES=config.in_features,
        OUT_FEATURES=config.out_features,
        IS_BLOCK_MAJOR=config.weight_format.layout is WeightLayout.BlockMajorK,
        IS_MAJOR_MN=config.weight_format.layout is WeightLayout.MajorMn,
        IS_SHUFFLED=config.weight_format.is_shuffled,
        IS_INTERLEAVED=config.is_interleaved,
        IS_GATED=config.is_gated,
        IS_GATE_FIRST=config.weight_format.is_gate_first,
        ACTIVATION=config.activation_name,
        SKIPS_TAILS=skips_tails,
        IS_DYNAMIC=is_dynamic,
        USES_PDL=uses_pdl,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=uses_pdl,
    )
