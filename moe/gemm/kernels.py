"""Which kernel runs a grouped GEMM: by GPU, problem and load, all known on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams, UnitSize
from moe.gemm.checks import check_gather, check_grouped
from moe.gemm.config import GemmConfig, GemmKernel
from moe.gemm.portable.gemm1 import launch_portable_gemm1
from moe.gemm.portable.gemm2 import launch_portable_gemm2
from moe.runtime import triton_versions

# Rows of an expert in the mean. Below, weights are all that is read; above, most experts take two units of the swapped kernels,
# which then read them twice. Timed on an H200: docs/measured_facts.md.
MIN_SWAPPED_ROWS = 49
MAX_SWAPPED_ROWS = 160
MIN_WIDE_TILE_ROWS = 64  # which the wide kernels take


class Kernel(NamedTuple):
    """A kernel that may run a stage: for which config, tile_rows and device, and its launch without checks."""

    family: GemmKernel
    takes: Callable[[GemmConfig, int, torch.device], bool]
    launch: Callable[..., Tensor]
    units: UnitSize | None = None  # how it wants rows cut


def _takes_all(config: GemmConfig, tile_rows: int, device: torch.device) -> bool:
    """GemmConfig refuses what is not in ACTIVATIONS["portable"]."""
    return True


def _hopper_kernels() -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Those in Gluon, of gemm1 and of gemm2: none where this Triton's Gluon is not one that they were written in."""
    if not triton_versions.has_known_gluon():
        return (), ()
    try:
        from moe.gemm.swapped import gemm1 as swapped1
        from moe.gemm.swapped import gemm2 as swapped2
        from moe.gemm.swapped.tile import SWAPPED_UNITS
        from moe.gemm.wide import gemm1 as wide1
        from moe.gemm.wide import gemm2 as wide2
        from moe.gemm.wide.tile import WIDE_UNITS
    except (ImportError, AttributeError) as error:
        triton_versions.warn_that_hopper_steps_aside(missing=str(error))
        return (), ()
    return (
        (
            Kernel("swapped", swapped1.takes, swapped1.launch_swapped_gemm1, SWAPPED_UNITS),
            Kernel("wide", wide1.takes, wide1.launch_wide_gemm1, WIDE_UNITS),
        ),
        (
            Kernel("swapped", swapped2.takes, swapped2.launch_swapped_gemm2, SWAPPED_UNITS),
            Kernel("wide", wide2.takes, wide2.launch_wide_gemm2, WIDE_UNITS),
        ),
    )


_HOPPER_GEMM1, _HOPPER_GEMM2 = _hopper_kernels()
KERNELS = {
    "gemm1": (Kernel("portable", _takes_all, launch_portable_gemm1), *_HOPPER_GEMM1),
    "gemm2": (Kernel("portable", _takes_all, launch_portable_gemm2), *_HOPPER_GEMM2),
}


@functools.lru_cache(maxsize=1024)
def kernels_for(stage: str, config: GemmConfig, tile_rows: int, device: torch.device) -> tuple[Kernel, ...]:
    """Those that take "gemm1" or "gemm2" of a layer: the portable one first, and always."""
    return tuple(kernel for kernel in KERNELS[stage] if kernel.takes(config, tile_rows, device))


@functools.lru_cache(maxsize=1024)
def kernel_for(stage: str, config: GemmConfig, tile_rows: int, mean_rows: int, device: torch.device) -> Kernel:
    """What runs a stage under a load: the config's kernel, else the fastest for so many rows an expert; or the portable one."""
    kernels = kernels_for(stage, config, tile_rows, device)
    family = config.kernel or _fastest(mean_rows, tile_rows)
    return next((kernel for kernel in kernels if kernel.family == family), kernels[0])


@functools.lru_cache(maxsize=1024)
def unit_size(
    device: torch.device, tile_rows: int, mean_rows: int, *, gemm1: GemmConfig, gemm2: GemmConfig
) -> UnitSize | None:
    """The units that both GEMMs of a layer take under such a load, or None: where a planner may make them in its launch."""
    first = kernel_for("gemm1", gemm1, tile_rows, mean_rows, device)
    second = kernel_for("gemm2", gemm2, tile_rows, mean_rows, device)
    return first.units if first.units is second.units else None


def gemm1_for(config: GemmConfig, *, uses_pdl: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`run_gemm1` of a config, and the same without checks."""
    return partial(run_gemm1, config=config, uses_pdl=uses_pdl), partial(launch_gemm1, config=config, uses_pdl=uses_pdl)


def gemm2_for(config: GemmConfig, *, uses_pdl: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`run_gemm2` of a config, and the same without checks."""
    return partial(run_gemm2, config=config, uses_pdl=uses_pdl), partial(launch_gemm2, config=config, uses_pdl=uses_pdl)


def run_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """gemm1 by the fastest kernel that takes it; arguments, result and errors as `portable_gemm1`."""
    check_gather(config, hidden_states, weights, permutation, swiglu, bias)
    return launch_gemm1(hidden_states, weights, permutation, config=config, swiglu=swiglu, bias=bias, uses_pdl=uses_pdl)


def launch_gemm1(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """`run_gemm1` of tensors that were checked."""
    load = (permutation.tile_rows, permutation.mean_rows, hidden_states.device)
    launch = kernel_for("gemm1", config, *load).launch
    return launch(hidden_states, weights, permutation, config=config, swiglu=swiglu, bias=bias, uses_pdl=uses_pdl)


def run_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """gemm2 by the fastest kernel that takes it; arguments, result and errors as `portable_gemm2`."""
    check_grouped(config, rows, weights, permutation, bias)
    return launch_gemm2(rows, weights, permutation, config=config, bias=bias, uses_pdl=uses_pdl)


def launch_gemm2(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    uses_pdl: bool = False,
) -> Tensor:
    """`run_gemm2` of tensors that were checked."""
    load = (permutation.tile_rows, permutation.mean_rows, rows.device)
    launch = kernel_for("gemm2", config, *load).launch
    return launch(rows, weights, permutation, config=config, bias=bias, uses_pdl=uses_pdl)


def _fastest(mean_rows: int, tile_rows: int) -> GemmKernel:
    if mean_rows < MIN_SWAPPED_ROWS:
        return "portable"
    return "swapped" if mean_rows <= MAX_SWAPPED_ROWS or tile_rows < MIN_WIDE_TILE_ROWS else "wide"
