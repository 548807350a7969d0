"""Which kernel runs a grouped GEMM: by GPU, problem and load, all known on the host."""

from __future__ import annotations

from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm.config import GemmConfig, GemmKernel
from moe.gemm.gather_gemm import gather_gemm
from moe.gemm.grouped_gemm import grouped_gemm
from moe.gemm.hopper_gather_gemm import hopper_gather_gemm
from moe.gemm.hopper_gather_gemm import takes as takes_wide_gather
from moe.gemm.hopper_grouped_gemm import hopper_grouped_gemm
from moe.gemm.hopper_grouped_gemm import takes as takes_wide_grouped
from moe.gemm.hopper_swapped_gather_gemm import hopper_swapped_gather_gemm
from moe.gemm.hopper_swapped_gather_gemm import takes as takes_swapped_gather
from moe.gemm.hopper_swapped_grouped_gemm import hopper_swapped_grouped_gemm
from moe.gemm.hopper_swapped_grouped_gemm import takes as takes_swapped_grouped

# Rows of an expert in the mean, on an H200. At 32 rows the portable kernels were 3 to 5% faster than the swapped ones, at 64
# rows 6 to 9% slower; at 128 rows the swapped ones were 1 to 23% faster than the wide ones, at 256 rows 3% slower.
MIN_SWAPPED_ROWS = 48
MAX_SWAPPED_ROWS = 192


def dispatch_gather_gemm(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Tensor:
    """gemm1 by the fastest kernel that takes it; arguments, result and errors as `gather_gemm`."""
    tensors, tile_rows, device = (hidden_states, weights, permutation), permutation.tile_rows, hidden_states.device
    kernel = config.kernel or _kernel_of_load(permutation)
    if kernel == "swapped" and takes_swapped_gather(config, tile_rows, device):
        return hopper_swapped_gather_gemm(*tensors, config=config, swiglu=swiglu)
    if kernel == "wide" and takes_wide_gather(config, tile_rows, device):
        return hopper_gather_gemm(*tensors, config=config, swiglu=swiglu)
    return gather_gemm(*tensors, config=config, swiglu=swiglu)


def dispatch_grouped_gemm(rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig) -> Tensor:
    """gemm2 by the fastest kernel that takes it; arguments, result and errors as `grouped_gemm`."""
    tile_rows, device = permutation.tile_rows, rows.device
    kernel = config.kernel or _kernel_of_load(permutation)
    if kernel == "swapped" and takes_swapped_grouped(config, tile_rows, device):
        return hopper_swapped_grouped_gemm(rows, weights, permutation, config=config)
    if kernel == "wide" and takes_wide_grouped(config, tile_rows, device):
        return hopper_grouped_gemm(rows, weights, permutation, config=config)
    return grouped_gemm(rows, weights, permutation, config=config)


def _kernel_of_load(permutation: Permutation) -> GemmKernel:
    if permutation.mean_rows < MIN_SWAPPED_ROWS:
        return "portable"
    return "swapped" if permutation.mean_rows <= MAX_SWAPPED_ROWS else "wide"
