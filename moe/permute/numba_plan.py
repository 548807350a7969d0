"""Stage 2 in numba-CUDA: as `plan_permutation`, faster, with the counts of a block in shared memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.flow import Permutation, RowUnits, TopK, UnitSize
from moe.permute.chunks import NUMBA_CHUNKING
from moe.permute.config import PermuteConfig
from moe.permute.numba_block import PlanBlock, Totals
from moe.permute.numba_count_kernel import build_count_kernel
from moe.permute.numba_plan_kernel import build_plan_kernel
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.device import current_stream
from moe.runtime.numba_launch import NumbaKernel
from moe.runtime.numba_warp_device import WARP_SIZE
from moe.runtime.scratch import new_scratch
from moe.stages import UnitSizeOf

MAX_LOCAL_EXPERTS = 2048  # the counts of a block lie in shared memory
CHUNKING = NUMBA_CHUNKING
WARPS = CHUNKING.block_slots // WARP_SIZE
FEW_WARPS = 8  # of the one block that places up to 256 slots: its barriers take less time


def takes(config: PermuteConfig) -> bool:
    """Whether the kernels take this config. `plan_permutation` takes every one."""
    return config.num_local_experts <= MAX_LOCAL_EXPERTS


def numba_plan_permutation(
    topk: TopK,
    *,
    config: PermuteConfig,
    uses_pdl: bool = False,
    unit_size: UnitSizeOf | None = None,
) -> Permutation:
    """Place every (token, choice) slot in a row of its expert.

    One launch for up to 16384 slots, two above. The result is a pure function of the expert ids:
    rows of an expert are in slot order, t * K + k ascending. An id that comes twice in a row of expert_ids gets two rows.

    Args:
        topk: expert_ids [T, K] int32. Ids out of [local_expert_offset, local_expert_offset + num_local_experts),
            negative and garbage ones included, get no row.
        config: the slice of experts that lies here, and the row count that each segment is padded to.
        uses_pdl: launches are dependent ones of those before them, and let a dependent one that follows start early
            (`moe.runtime.dependent_launch`).
        unit_size: which RowUnits the GEMMs want, if any, given device, tile_rows and mean_rows; they are made on the way.
    Returns:
        Permutation over P = config.max_rows(T) rows. Entries from num_rows and num_tiles on are undefined.
    Raises:
        ValueError: naming the tensor, what was wanted and what came; or the config is beyond the kernels.
    Source: flashinfer's trtllm-gen routing has the same maps, with rows of an expert in no promised order.
    """
    config.check(topk)
    if not takes(config):
        raise ValueError(
            f"config: expected num_local_experts <= {MAX_LOCAL_EXPERTS}, got num_local_experts="
            f"{config.num_local_experts}; use plan_permutation, which takes any number"
        )
    return launch_numba_plan_permutation(topk, config=config, uses_pdl=uses_pdl, unit_size=unit_size)


def launch_numba_plan_permutation(
    topk: TopK, *, config: PermuteConfig, uses_pdl: bool = False, unit_size: UnitSizeOf | None = None
) -> Permutation:
    """`numba_plan_permutation` of tensors that were checked, for a config that the kernels take."""
    load = _load_of(config, topk.expert_ids.shape[0], topk.expert_ids.device, unit_size, uses_pdl)  # type: ignore[arg-type]  # hashable, being a function
    permutation = _allocate(topk, load)
    if not load.num_slots:
        permutation.num_rows.zero_()
        permutation.num_tiles.zero_()
        return permutation
    counts = _count(topk, config, load) if load.num_columns else None
    _place(topk, counts, permutation, config, load)
    return permutation


@dataclass(frozen=True)
class _Load:
    """What is known of a plan before its tensors are."""

    num_slots: int
    tile_rows: int
    mean_rows: int
    max_rows: int
    unit_size: UnitSize | None
    uses_pdl: bool
    kernels: tuple[NumbaKernel, ...]  # the one that places slots comes last; none without slots
    chunk_slots: int  # slots of a block
    num_columns: int  # counts of an expert that pass from launch to launch; 0 with one launch

    @property
    def max_tiles(self) -> int:
        return self.max_rows // self.tile_rows


@functools.lru_cache(maxsize=1024)
def _load_of(
    config: PermuteConfig, num_tokens: int, device: torch.device, unit_size: UnitSizeOf | None, uses_pdl: bool
) -> _Load:
    """Kept, since it takes as long as the launch."""
    num_slots, num_experts = num_tokens * config.top_k, config.num_local_experts
    tile_rows, mean_rows = config.rows_per_tile(num_tokens), config.mean_rows(num_tokens)
    size = unit_size(device, tile_rows, mean_rows) if unit_size is not None and num_slots else None
    uses_pdl = uses_pdl and launches_dependents(device)
    sizes = (num_slots, tile_rows, mean_rows, config.max_rows(num_tokens), size, uses_pdl)
    if not num_slots:
        return _Load(*sizes, kernels=(), chunk_slots=0, num_columns=0)
    kernels = kernels_for(config, num_slots, size, uses_pdl)
    if len(kernels) == 1:
        return _Load(*sizes, kernels, chunk_slots=kernels[0].threads_per_block, num_columns=0)
    chunk_slots = CHUNKING.chunk_slots(num_slots, num_experts)
    return _Load(*sizes, kernels, chunk_slots, CHUNKING.num_columns(num_slots, num_experts))


def _allocate(topk: TopK, load: _Load) -> Permutation:
    new = functools.partial(new_scratch, topk.expert_ids)  # int32
    max_tiles = load.max_tiles
    units = None
    if load.unit_size is not None:
        units = RowUnits(new((5, max_tiles)), new((2,)), load.unit_size, current_stream(topk.expert_ids.device))
    return Permutation(
        row_of_slot=new(topk.expert_ids.shape),
        token_of_row=new((load.max_rows,)),
        expert_of_tile=new((max_tiles,)),
        row_limit_of_tile=new((max_tiles,)),
        num_rows=new((1,)),
        num_tiles=new((1,)),
        tile_rows=load.tile_rows,
        mean_rows=load.mean_rows,
        units=units,
    )


def _count(topk: TopK, config: PermuteConfig, load: _Load) -> Tensor:
    """Counts of each expert and chunk, [E_local, num_columns]."""
    counts = new_scratch(topk.expert_ids, (config.num_local_experts, load.num_columns))
    load.kernels[0].launch(
        load.num_columns,
        topk.expert_ids,
        counts,
        load.num_slots,
        load.chunk_slots,
        config.local_expert_offset,
        config.num_local_experts,
        uses_pdl=load.uses_pdl,
    )
    return counts


def _place(topk: TopK, counts: Tensor | None, permutation: Permutation, config: PermuteConfig, load: _Load) -> None:
    units = permutation.units
    load.kernels[-1].launch(
        -(-load.num_slots // load.chunk_slots),
        topk.expert_ids,
        counts,
        permutation.row_of_slot,
        permutation.token_of_row,
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_rows,
        permutation.num_tiles,
        load.num_slots,
        load.chunk_slots,
        config.local_expert_offset,
        config.num_local_experts,
        load.tile_rows.bit_length() - 1,
        units.records if units else None,
        units.counts if units else None,
        load.max_tiles,
        uses_pdl=load.uses_pdl,
    )


def kernels_for(
    config: PermuteConfig, num_slots: int, size: UnitSize | None, uses_pdl: bool
) -> tuple[NumbaKernel, ...]:
    """What plans for so many slots, at least one: the kernel that places them all; above 16384 one that counts comes first."""
    num_bins = _num_bins(config)
    if num_slots > CHUNKING.max_slots_in_one_launch:
        return (
            count_kernel_of(num_bins, WARPS, uses_pdl=uses_pdl),
            plan_kernel_of(num_bins, WARPS, config.top_k, Totals.COUNTS, size, uses_pdl=uses_pdl),
        )
    num_warps = FEW_WARPS if num_slots <= FEW_WARPS * WARP_SIZE else WARPS
    is_whole = num_slots <= PlanBlock(num_bins, num_warps, Totals.CHUNK).round_slots
    totals = Totals.CHUNK if is_whole else Totals.SLOTS
    return (plan_kernel_of(num_bins, num_warps, config.top_k, totals, size, uses_pdl=uses_pdl),)


@functools.cache
def count_kernel_of(num_bins: int, num_warps: int, *, uses_pdl: bool = False) -> NumbaKernel:
    function = build_count_kernel(num_bins=num_bins, num_warps=num_warps, uses_pdl=uses_pdl)
    parameters = (*("*int32",) * 2, *("int32",) * 4)
    return NumbaKernel(function, parameters, num_warps * WARP_SIZE, f"count_kernel {num_bins} {uses_pdl}")


@functools.cache
def plan_kernel_of(
    num_bins: int,
    num_warps: int,
    top_k: int,
    totals: Totals,
    unit_size: UnitSize | None = None,
    *,
    uses_pdl: bool = False,
) -> NumbaKernel:
    block = PlanBlock(num_bins, num_warps, totals, unit_size)
    function = build_plan_kernel(block=block, top_k=top_k, uses_pdl=uses_pdl)
    parameters = (*("*int32",) * 8, *("int32",) * 5, "*int32", "*int32", "int32")
    built_for = f"plan_kernel {num_bins} {top_k} {totals} {unit_size} {uses_pdl}"
    return NumbaKernel(function, parameters, num_warps * WARP_SIZE, built_for)


def _num_bins(config: PermuteConfig) -> int:
    """A power of two, so that few kernels differ in it."""
    return max(1 << (config.num_local_experts - 1).bit_length(), WARP_SIZE)
