"""Which kernel runs a grouped GEMM: by GPU, problem and load, all known on the host."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams, UnitSize
from moe.gemm.config import GemmConfig, GemmKernel
from moe.gemm.hopper.problem import WIDE_UNITS
from moe.gemm.portable.gemm1 import portable_gemm1
from moe.gemm.portable.gemm2 import portable_gemm2
from moe.gemm.swapped.gemm1 import swapped_gemm1
from moe.gemm.swapped.gemm1 import takes as takes_swapped_gemm1
from moe.gemm.swapped.gemm2 import swapped_gemm2
from moe.gemm.swapped.gemm2 import takes as takes_swapped_gemm2
from moe.gemm.swapped.tile import SWAPPED_UNITS
from moe.gemm.wide.gemm1 import takes as takes_wide_gemm1
from moe.gemm.wide.gemm1 import wide_gemm1
from moe.gemm.wide.gemm2 import takes as takes_wide_gemm2
from moe.gemm.wide.gemm2 import wide_gemm2

# Rows of an expert in the mean, on an H200. At 32 rows the portable kernels were 3 to 5% faster than the swapped ones, at 48 2 to
# 6% (with tiles of half the rows), at 64 rows 6 to 9% slower; at 128 rows the swapped ones were 1 to 23% faster than the wide
# ones, at 192 rows, where most experts take two units, 3 to 5% slower, at 256 rows 3%.
MIN_SWAPPED_ROWS = 49
MAX_SWAPPED_ROWS = 160
MIN_WIDE_TILE_ROWS = 64  # which the wide kernels take


def run_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """gemm1 by the fastest kernel that takes it; arguments, result and errors as `portable_gemm1`."""
    tensors, tile_rows, device = (hidden_states, weights, permutation), permutation.tile_rows, hidden_states.device
    kernel = config.kernel or _kernel_of_load(permutation.mean_rows, tile_rows)
    if kernel == "swapped" and takes_swapped_gemm1(config, tile_rows, device):
        return swapped_gemm1(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)
    if kernel == "wide" and takes_wide_gemm1(config, tile_rows, device):
        return wide_gemm1(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)
    return portable_gemm1(*tensors, config=config, swiglu=swiglu, uses_pdl=uses_pdl)


def run_gemm2(
    rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig, uses_pdl: bool = False
) -> Tensor:
    """gemm2 by the fastest kernel that takes it; arguments, result and errors as `portable_gemm2`."""
    tile_rows, device = permutation.tile_rows, rows.device
    kernel = config.kernel or _kernel_of_load(permutation.mean_rows, tile_rows)
    if kernel == "swapped" and takes_swapped_gemm2(config, tile_rows, device):
        return swapped_gemm2(rows, weights, permutation, config=config, uses_pdl=uses_pdl)
    if kernel == "wide" and takes_wide_gemm2(config, tile_rows, device):
        return wide_gemm2(rows, weights, permutation, config=config, uses_pdl=uses_pdl)
    return portable_gemm2(rows, weights, permutation, config=config, uses_pdl=uses_pdl)


@functools.lru_cache(maxsize=1024)
def unit_size(
    device: torch.device, tile_rows: int, mean_rows: int, *, gemm1: GemmConfig, gemm2: GemmConfig
) -> UnitSize | None:
    """The units that both GEMMs of a layer take under such a load, or None: where a planner may make them in its launch."""
    kernels = {gemm.kernel or _kernel_of_load(mean_rows, tile_rows) for gemm in (gemm1, gemm2)}
    if kernels == {"swapped"} and takes_swapped_gemm1(gemm1, tile_rows, device):
        return SWAPPED_UNITS if takes_swapped_gemm2(gemm2, tile_rows, device) else None
    if kernels == {"wide"} and takes_wide_gemm1(gemm1, tile_rows, device):
        return WIDE_UNITS if takes_wide_gemm2(gemm2, tile_rows, device) else None
    return None


def _kernel_of_load(mean_rows: int, tile_rows: int) -> GemmKernel:
    if mean_rows < MIN_SWAPPED_ROWS:
        return "portable"
    return "swapped" if mean_rows <= MAX_SWAPPED_ROWS or tile_rows < MIN_WIDE_TILE_ROWS else "wide"
