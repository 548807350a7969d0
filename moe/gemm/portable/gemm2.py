"""Stage 4: multiply each row by its expert's W2."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.checks import check_grouped
from moe.gemm.config import GemmConfig
from moe.gemm.portable.gemm2_kernel import portable_gemm2_kernel
from moe.gemm.portable.tile import launch_tile, programs_at_once
from moe.gemm.weight_format import weight_strides
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.device import num_sms
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

MIN_ROUNDS = 4  # of programs, as many at once as the GPU holds


def portable_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """rows @ W2[expert_of_row]^T + bias.

    Args:
        rows: [P, I] bf16; padding rows may hold anything, NaN included.
        weights: bf16, config.weight_shape, as config.weight_format says.
        permutation: where rows lie; a program takes permutation.tile_rows of them.
        bias: [E_local, rows of an expert's weight] bf16 or float32, in the order of those rows, added to the fp32 products.
        uses_pdl: the launch is a dependent one of the launch before it (`moe.runtime.dependent_launch`), where the GPU has them
            and it is no loss.

    Returns:
        [P, H] bf16, rounded once. Padding rows are uninitialised memory.

    Raises:
        ValueError: where a tensor does not fit the config.
    """
    check_grouped(config, rows, weights, permutation, bias)
    return launch_portable_gemm2(rows, weights, permutation, config=config, bias=bias, uses_pdl=uses_pdl)


def launch_portable_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """`portable_gemm2` of tensors that were checked."""
    out = new_scratch(rows, (permutation.max_rows, config.out_features))
    if not out.numel():
        return out
    uses_pdl = uses_pdl and _gains_by_pdl(config, permutation, rows.device)
    kernel, num_columns = _kernel_of(config, permutation.tile_rows, rows.device, uses_pdl)
    kernel.launch(
        (permutation.max_tiles * num_columns, 1, 1),
        rows,
        weights,
        out,
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_tiles,
        bias,
    )
    return out


def _gains_by_pdl(config: GemmConfig, permutation: Permutation, device: torch.device) -> bool:
    """Whether the GPU has dependent launches, and the programs spread evenly over its multiprocessors then.

    Dependent programs pile up on the multiprocessors that gemm1 leaves first, as many as one holds. Where there are few, the
    others stay idle (docs/measured_facts.md).
    """
    at_once = programs_at_once(config, permutation.tile_rows, device)
    num_columns = -(-config.out_features // launch_tile(config, permutation.tile_rows, device).block_n)
    is_even = at_once == num_sms(device) or permutation.max_tiles * num_columns >= MIN_ROUNDS * at_once
    return is_even and launches_dependents(device)


@functools.cache
def _kernel_of(config: GemmConfig, tile_rows: int, device: torch.device, uses_pdl: bool) -> tuple[TritonKernel, int]:
    """The kernel of a config, and how many programs share a tile of rows."""
    tile = launch_tile(config, tile_rows, device)
    strides = weight_strides(config)
    kernel = TritonKernel(
        portable_gemm2_kernel,
        IN_FEATURES=config.in_features,
        OUT_FEATURES=config.out_features,
        IS_SHUFFLED=config.weight_format.is_shuffled,
        ROW_STRIDE=strides.row,
        K_STRIDE=strides.k,
        BLOCK_STRIDE=strides.block,
        BLOCK_M=tile_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_TILES=tile.group_tiles,
        USES_PDL=uses_pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=uses_pdl,
    )
    return kernel, -(-config.out_features // tile.block_n)
