"""The gradient through gemm2, the routing weight and the activation, on Hopper."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Gemm2Gradients, Permutation, SwigluParams, TopK
from moe.gemm.backward.hopper_dgrad_kernel import hopper_gemm2_dgrad_kernel
from moe.gemm.backward.row_sums import sums_of_slots, weigh_rows
from moe.gemm.backward.transposed import transposed
from moe.gemm.config import ActivationType, GemmConfig, WeightLayout
from moe.gemm.hopper.boxes import half_row_boxes, row_boxes
from moe.gemm.hopper.problem import MAX_COORDINATE, MAX_MESSAGE, MAX_REGISTERS, num_blocks
from moe.gemm.hopper.work_units import units_of
from moe.gemm.wide.tile import HALF_ROWS, TILE_ROWS, WIDE_UNITS
from moe.runtime.device import is_hopper
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

BLOCK_N = 256  # columns of the activation
BLOCK_K = 64
PIECE = 64  # columns that are read and written at a time


def takes(config: GemmConfig, gemm1: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """Whether `launch_hopper_gemm2_dgrad` computes this."""
    return is_hopper(device) and fits_dgrad(config, gemm1, tile_rows)


@functools.lru_cache(maxsize=1024)
def fits_dgrad(config: GemmConfig, gemm1: GemmConfig, tile_rows: int) -> bool:
    """Whether steps of the contraction end where an expert's weights do: SwiGLU, W2 in MajorK, H a multiple of 64."""
    return (
        tile_rows in TILE_ROWS
        and gemm1.activation is ActivationType.Swiglu
        and not gemm1.is_interleaved
        and config.weight_format.layout is WeightLayout.MajorK
        and config.out_features % BLOCK_K == 0
        and config.out_features > BLOCK_K  # the next piece of work is asked for in the second step
        and config.num_experts <= MAX_MESSAGE
        and -(-config.in_features // BLOCK_N) <= MAX_MESSAGE
        and config.num_experts * config.out_features < MAX_COORDINATE
    )


def launch_hopper_gemm2_dgrad(
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
    """As `launch_portable_gemm2_dgrad`, of what `takes` says that it computes."""
    grad_gate_up = new_scratch(gate_up, tuple(gate_up.shape))
    weighted = new_scratch(gate_up, (permutation.max_rows, config.in_features))
    row_sums = new_scratch(gate_up, (-(-config.in_features // BLOCK_N), permutation.max_rows), torch.float32)
    alpha, beta, clamp_limit = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
    if permutation.max_rows:
        units = units_of(permutation, WIDE_UNITS)
        _kernel_of(config, gemm1, permutation.tile_rows).launch(
            (num_blocks(units, transposed(config), BLOCK_N), 1, 1),
            grad_output,
            row_boxes(weights, BLOCK_K, BLOCK_N),
            *half_row_boxes(gate_up, HALF_ROWS, PIECE),
            *half_row_boxes(grad_gate_up, HALF_ROWS, PIECE),
            row_boxes(weighted, HALF_ROWS, PIECE),
            row_sums,
            weigh_rows(topk.weights, permutation),
            permutation.token_of_row,
            units.records,
            units.counts,
            alpha,
            beta,
            clamp_limit,
            numbers=(units.max_units, permutation.max_rows),
        )
    return Gemm2Gradients(grad_gate_up, weighted, sums_of_slots(row_sums, permutation))


@functools.cache
def _kernel_of(config: GemmConfig, gemm1: GemmConfig, tile_rows: int) -> TritonKernel:
    return TritonKernel(
        hopper_gemm2_dgrad_kernel,
        IN_FEATURES=config.out_features,
        OUT_FEATURES=config.in_features,
        IS_GATE_FIRST=gemm1.weight_format.is_gate_first,
        FILLS_TAILS=tile_rows > HALF_ROWS,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
