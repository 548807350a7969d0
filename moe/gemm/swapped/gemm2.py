"""Stage 4 on Hopper, for loads of some tens of rows an expert."""

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
from moe.gemm.swapped.gemm2_kernel import swapped_gemm2_kernel
from moe.gemm.swapped.tile import (
    ROW_MULTIPLE,
    SWAPPED_UNITS,
    TILE_ROWS,
    fits_swapped,
    store_rows,
    weight_boxes,
)
from moe.runtime.device import is_hopper
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

BLOCK_N = 256  # columns of the result


def takes(config: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """Whether `swapped_gemm2` computes this: a contraction of more than 64, tile_rows 16 to 128, any weights but shuffled MajorMn."""
    return is_hopper(device) and config.activation is None and fits_swapped(config, tile_rows, BLOCK_N)


def swapped_gemm2(
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
    if config.activation is not None or not fits_swapped(config, permutation.tile_rows, BLOCK_N):
        raise ValueError(
            "swapped_gemm2: expected no activation, a contraction of more than 64, "
            f"tile_rows of {TILE_ROWS} and no shuffled MajorMn weights; "
            f"got {config!r} and tile_rows={permutation.tile_rows}; use portable_gemm2"
        )
    return launch_swapped_gemm2(
        rows, weights, permutation, config=config, bias=bias, is_dynamic=is_dynamic, uses_pdl=uses_pdl
    )


def launch_swapped_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    is_dynamic: bool = True,
    uses_pdl: bool = False,
) -> Tensor:
    """`swapped_gemm2` of tensors that were checked, where `takes` says that it computes this."""
    out = new_scratch(rows, (permutation.max_rows, config.out_features))
    if not out.numel():
        return out
    units = units_of(permutation, SWAPPED_UNITS, uses_pdl=uses_pdl)
    does_prefetch = uses_pdl and units is permutation.units
    _kernel_of(config, is_dynamic, uses_pdl, does_prefetch).launch(
        (num_blocks(units, config, BLOCK_N), 1, 1),
        row_boxes(rows, ROW_MULTIPLE, 64),
        weight_boxes(weights, config),
        row_boxes(out, store_rows(permutation.tile_rows), 64),
        units.records,
        units.counts,
        bias,
        numbers=(units.max_units,),
    )
    return out


@functools.cache
def _kernel_of(config: GemmConfig, is_dynamic: bool, uses_pdl: bool, does_prefetch: bool) -> TritonKernel:
    return TritonKernel(
        swapped_gemm2_kernel,
        IN_FEATURES=config.in_features,
        OUT_FEATURES=config.out_features,
        IS_BLOCK_MAJOR=config.weight_format.layout is WeightLayout.BlockMajorK,
        IS_MAJOR_MN=config.weight_format.layout is WeightLayout.MajorMn,
        IS_SHUFFLED=config.weight_format.is_shuffled,
        IS_DYNAMIC=is_dynamic,
        USES_PDL=uses_pdl,
        PREFETCHES=does_prefetch,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=uses_pdl,
    )
