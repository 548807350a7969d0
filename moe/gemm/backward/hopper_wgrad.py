"""Gradients of W1 and W2 on Hopper."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.backward.hopper_wgrad_kernel import hopper_wgrad_kernel
from moe.gemm.backward.wgrad import rows_of_experts
from moe.gemm.config import GemmConfig, WeightLayout
from moe.gemm.hopper.boxes import row_boxes
from moe.gemm.hopper.problem import MAX_COORDINATE, MAX_MESSAGE, MAX_REGISTERS
from moe.runtime.device import is_hopper, num_sms
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

TILE_ROWS = (64, 128)
GATHERED_COLUMNS, DIRECT_COLUMNS, STORE_COLUMNS = 128, 256, 128  # of a piece of work, and of what is written at a time
MAX_BLOCKS = 1 << 12  # which a message between warps has bits for


def takes(config: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """Whether the two functions here compute a weight gradient of this config."""
    return is_hopper(device) and fits_wgrad(config, tile_rows)


@functools.lru_cache(maxsize=1024)
def fits_wgrad(config: GemmConfig, tile_rows: int) -> bool:
    """Whether blocks of columns of both operands end where an expert's gradient does."""
    gathered, direct, is_transposed = _sides(config)
    return (
        tile_rows in TILE_ROWS
        and gathered % GATHERED_COLUMNS == 0
        and direct % (STORE_COLUMNS if is_transposed else 8) == 0
        and gathered // GATHERED_COLUMNS < MAX_BLOCKS
        and -(-direct // DIRECT_COLUMNS) < MAX_BLOCKS
        and config.num_experts <= MAX_MESSAGE
        and config.num_experts * max(gathered, direct) < MAX_COORDINATE
    )


def launch_hopper_gemm1_wgrad(
    grad_gate_up: Tensor,
    hidden_states: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """As `launch_portable_gemm1_wgrad`, but that padding rows of grad_gate_up are read, and must be zeros."""
    return _launch(hidden_states, grad_gate_up, permutation, config, out)


def launch_hopper_gemm2_wgrad(
    grad_output: Tensor,
    weighted_activation: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """As `launch_portable_gemm2_wgrad`, but that padding rows of weighted_activation are read, and must be zeros."""
    return _launch(grad_output, weighted_activation, permutation, config, out)


def _launch(
    gathered: Tensor, direct: Tensor, permutation: Permutation, config: GemmConfig, out: Tensor | None
) -> Tensor:
    grad = new_scratch(gathered, config.weight_shape) if out is None else out
    rows_of_expert = rows_of_experts(permutation, config.num_experts, grad if out is None else None)
    _, _, is_transposed = _sides(config)
    boxes = None
    if out is None:
        box = (STORE_COLUMNS, GATHERED_COLUMNS // 2) if is_transposed else (GATHERED_COLUMNS // 2, STORE_COLUMNS)
        boxes = row_boxes(grad, *box)
    if permutation.max_rows:
        num_work = config.num_experts * (gathered.shape[1] // GATHERED_COLUMNS) * -(-direct.shape[1] // DIRECT_COLUMNS)
        _kernel_of(config).launch(
            (min(num_work, num_sms(grad.device)), 1, 1),
            gathered,
            row_boxes(direct, 64, DIRECT_COLUMNS),
            boxes,
            out,
            permutation.token_of_row,
            rows_of_expert,
        )
    return grad


@functools.lru_cache(maxsize=1024)
def _sides(config: GemmConfig) -> tuple[int, int, bool]:
    """Columns of rows of tokens, of the other operand, and whether the stored gradient has the latter first: [E, direct, gathered]."""
    is_gemm2 = config.activation is None
    gathered, direct = (
        (config.weight_rows, config.in_features) if is_gemm2 else (config.in_features, config.weight_rows)
    )
    return gathered, direct, is_gemm2 == (config.weight_format.layout is WeightLayout.MajorMn)


@functools.cache
def _kernel_of(config: GemmConfig) -> TritonKernel:
    gathered, direct, is_transposed = _sides(config)
    return TritonKernel(
        hopper_wgrad_kernel,
        NUM_EXPERTS=config.num_experts,
        GATHERED=gathered,
        DIRECT=direct,
        IS_TRANSPOSED=is_transposed,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
