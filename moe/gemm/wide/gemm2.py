"""Stage 4 on Hopper, for loads of many rows an expert."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.checks import check_grouped
from moe.gemm.config import GemmConfig, WeightLayout
from moe.gemm.hopper.boxes import row_boxes
from moe.gemm.hopper.problem import MAX_REGISTERS, num_blocks
from moe.gemm.hopper.work_units import units_of
from moe.gemm.wide.gemm2_kernel import wide_gemm2_kernel
from moe.gemm.wide.tile import HALF_ROWS, WIDE_UNITS, fits_wide, skips_tails, weight_row_boxes
from moe.runtime.device import is_hopper
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

BLOCK_N = 256  # columns of the result


def takes(config: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """Whether `wide_gemm2` computes this: a contraction of more than 64, tile_rows 64 or 128, any weights but shuffled MajorMn."""
    return is_hopper(device) and config.activation is None and fits_wide(config, tile_rows, BLOCK_N)


def wide_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    is_dynamic: bool = True,
    uses_pdl: bool = False,
) -> Tensor:
    """rows @ W2[expert_of_row]^T + bias; arguments and result as `portable_gemm2`.

    Args:
        is_dynamic: blocks take the next piece of work as they finish one, rather than every n-th.
        uses_pdl: the launch is a dependent one of the launch before it (`moe.runtime.dependent_launch`).

    Raises:
        ValueError: where a tensor does not fit the config, or the kernel does not take the config.
    """
    check_grouped(config, rows, weights, permutation, bias)
    if config.activation is not None or not fits_wide(config, permutation.tile_rows, BLOCK_N):
        raise ValueError(
            "wide_gemm2: expected no activation, a contraction of more than 64, "
            f"tile_rows of 64 or 128 and no shuffled MajorMn weights; "
            f"got {config!r} and tile_rows={permutation.tile_rows}; use portable_gemm2"
        )
    return launch_wide_gemm2(
        rows, weights, permutation, config=config, bias=bias, is_dynamic=is_dynamic, uses_pdl=uses_pdl
    )


def launch_wide_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    is_dynamic: bool = True,
    uses_pdl: bool = False,
) -> Tensor:
    """`wide_gemm2` of tensors that were checked, where `takes` says that it computes this."""
    out = new_scratch(rows, (permutation.max_rows, config.out_features))
    if not out.numel():
        return out
    units = units_of(permutation, WIDE_UNITS, uses_pdl=uses_pdl)
    _kernel_of(config, skips_tails(config, permutation.tile_rows), is_dynamic, uses_pdl).launch(
        (num_blocks(units, config, BLOCK_N), 1, 1),
        row_boxes(rows, HALF_ROWS, 64),
        weight_row_boxes(weights, config, BLOCK_N),
        row_boxes(out, HALF_ROWS, 128),
        units.records,
        units.counts,
        bias,
        numbers=(units.max_units,),
    )
    return out


@functools.cache
def _kernel_of(config: GemmConfig, skips_tails: bool, is_dynamic: bool, uses_pdl: bool) -> TritonKernel:
    return TritonKernel(
        wide_gemm2_kernel,
        IN_FEATURES=config.in_features,
        OUT_FEATURES=config.out_features,
        IS_BLOCK_MAJOR=config.weight_format.layout is WeightLayout.BlockMajorK,
        IS_MAJOR_MN=config.weight_format.layout is WeightLayout.MajorMn,
        IS_SHUFFLED=config.weight_format.is_shuffled,
        SKIPS_TAILS=skips_tails,
        IS_DYNAMIC=is_dynamic,
        USES_PDL=uses_pdl,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=uses_pdl,
    )
