"""Which kernel runs a grouped GEMM: by GPU, problem and load, all known on the host."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams, UnitSize
from moe.gemm.config import GemmConfig, GemmKernel
from moe.gemm.gather_gemm import gather_gemm
from moe.gemm.grouped_gemm import grouped_gemm
from moe.gemm.hopper_gather_gemm import hopper_gather_gemm
from moe.gemm.hopper_gather_gemm import takes as takes_wide_gather
from moe.gemm.hopper_grouped_gemm import hopper_grouped_gemm
from moe.gemm.hopper_grouped_gemm import takes as takes_wide_grouped
from moe.gemm.hopper_launch import WIDE_UNITS
from moe.gemm.hopper_swapped_gather_gemm import hopper_swapped_gather_gemm
from moe.gemm.hopper_swapped_gather_gemm import takes as takes_swapped_gather
from moe.gemm.hopper_swapped_grouped_gemm import hopper_swapped_grouped_gemm
from moe.gemm.hopper_swapped_grouped_gemm import takes as takes_swapped_grouped
from moe.gemm.hopper_swapped_launch import SWAPPED_UNITS

# Rows of an expert in the mean, on an H200. At 32 rows the portable kernels were 3 to 5% faster than the swapped ones, at 48 2 to
# 6% (with tiles of half the rows), at 64 rows 6 to 9% slower; at 128 rows the swapped ones were 1 to 23% faster than the wide
# ones, at 192 rows, where most experts take two units, 3 to 5% slower, at 256 rows 3%.
MIN_SWAPPED_ROWS = 49
MAX_SWAPPED_ROWS = 160
MIN_WIDE_TILE_ROWS = 64  # which the wide kernels take


def dispatch_gather_gemm(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """gemm1 by the fastest kernel that takes it; arguments, result and errors as `gather_gemm`."""
    tensors, tile_rows, device = (hidden_states, weights, permutation), permutation.tile_rows, hidden_states.device
    kernel = config.kernel or _kernel_of_load(permutation.mean_rows, tile_rows)
    if kernel == "swapped" and takes_swapped_gather(config, tile_rows, device):
        return hopper_swapped_gather_gemm(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)
    if kernel == "wide" and takes_wide_gather(config, tile_rows, device):
        return hopper_gather_gemm(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)
    return gather_gemm(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)


def dispatch_grouped_gemm(
    rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig, uses_pdl: bool = False
) -> Tensor:
    """gemm2 by the fastest kernel that takes it; arguments, result and errors as `grouped_gemm`."""
    tile_rows, device = permutation.tile_rows, rows.device
    kernel = config.kernel or _kernel_of_load(permutation.mean_rows, tile_rows)
    if kernel == "swapped" and takes_swapped_grouped(config, tile_rows, device):
        return hopper_swapped_grouped_gemm(rows, weights, permutation, config=config, uses_pdl=uses_pdl)
    if kernel == "wide" and takes_wide_grouped(config, tile_rows, device):
        return hopper_grouped_gemm(rows, weights, permutation, config=config, uses_pdl=uses_pdl)
    return grouped_gemm(rows, weights, permutation, config=config, uses_pdl=uses_pdl)


@functools.lru_cache(maxsize=1024)
def unit_size(
    device: torch.device, tile_rows: int, mean_rows: int, *, gemm1: GemmConfig, gemm2: GemmConfig
) -> UnitSize | None:
    """The units that both GEMMs of a layer take under such a load, or None: where a planner may make them in its launch."""
    kernels = {gemm.kernel or _kernel_of_load(mean_rows, tile_rows) for gemm in (gemm1, gemm2)}
    if kernels == {"swapped"} and takes_swapped_gather(gemm1, tile_rows, device):
        return SWAPPED_UNITS if takes_swapped_grouped(gemm2, tile_rows, device) else None
    if kernels == {"wide"} and takes_wide_gather(gemm1, tile_rows, device):
        return WIDE_UNITS if takes_wide_grouped(gemm2, tile_rows, device) else None
    return None


def _kernel_of_load(mean_rows: int, tile_rows: int) -> GemmKernel:
    if mean_rows < MIN_SWAPPED_ROWS:
        return "portable"
    return "swapped" if mean_rows <= MAX_SWAPPED_ROWS or tile_rows < MIN_WIDE_TILE_ROWS else "wide"
