"""Which kernel runs a grouped GEMM: by GPU, problem and load, all known on the host."""

from __future__ import annotations

from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm import hopper_gather_gemm, hopper_grouped_gemm
from moe.gemm.config import GemmConfig
from moe.gemm.gather_gemm import gather_gemm
from moe.gemm.grouped_gemm import grouped_gemm

# Padded to 128 rows, an expert has more than 64 in the mean: enough to keep tensor cores, not memory, the limit.
MIN_HOPPER_TILE_ROWS = 128


def dispatch_gather_gemm(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> Tensor:
    """gemm1 by the fastest kernel that takes it; arguments, result and errors as `gather_gemm`."""
    tile_rows = permutation.tile_rows
    if tile_rows >= MIN_HOPPER_TILE_ROWS and hopper_gather_gemm.takes(config, tile_rows, hidden_states.device):
        kernel = hopper_gather_gemm.hopper_gather_gemm
        return kernel(hidden_states, weights, permutation, config=config, swiglu=swiglu)
    return gather_gemm(hidden_states, weights, permutation, config=config, swiglu=swiglu)


def dispatch_grouped_gemm(rows: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig) -> Tensor:
    """gemm2 by the fastest kernel that takes it; arguments, result and errors as `grouped_gemm`."""
    tile_rows = permutation.tile_rows
    if tile_rows >= MIN_HOPPER_TILE_ROWS and hopper_grouped_gemm.takes(config, tile_rows, rows.device):
        return hopper_grouped_gemm.hopper_grouped_gemm(rows, weights, permutation, config=config)
    return grouped_gemm(rows, weights, permutation, config=config)
