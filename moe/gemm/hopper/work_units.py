"""The order in which Hopper's persistent GEMMs take their work, made on the device from a Permutation.

Work number w, for a GEMM of B column blocks over `RowUnits`, is

    any_unit = w // B                                                      some unit of the right group
    first, size = first unit and number of units of any_unit's group
    unit = first + (w - first * B) % size;  column block = (w - first * B) // size

so the units of a group take a column block one after another, then the next one.

Example, tile_rows=64, UnitSize(128, 128, 22), expert_of_tile [0, 0, 0, 2], row_limit_of_tile [150, 150, 150, 200]:

    expert        0    0    2
    first row     0  128  192
    real rows   128   22    8
    group         0    0    2   (its first unit; the sizes are 2, 2, 1)
"""

from __future__ import annotations

import functools

import torch
import triton

from moe.flow import Permutation, RowUnits, UnitSize
from moe.gemm.hopper.work_units_kernel import plan_units_kernel
from moe.runtime.device import current_stream
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

UNIT_FIELDS = 5  # rows of RowUnits.records
MAX_CHUNK = 1024  # tiles that the planning kernel takes at a time


def units_of(permutation: Permutation, size: UnitSize, *, uses_pdl: bool = False) -> RowUnits:
    """The permutation's own units where they have this size and this stream orders their users, else new ones.

    Kernels on two streams may run at once, and must not count with one counter.
    """
    units = permutation.units
    if units is not None and units.size == size and units.stream == current_stream(units.counts.device):
        return units
    return plan_units(permutation, size, uses_pdl=uses_pdl)


def plan_units(permutation: Permutation, size: UnitSize, *, uses_pdl: bool = False) -> RowUnits:
    """The units of a permutation whose tile_rows are at most size.max_rows.

    Args:
        uses_pdl: the launch is a dependent one of the launch before it.
    """
    max_tiles = permutation.max_tiles
    new = functools.partial(new_scratch, permutation.expert_of_tile)
    units = RowUnits(new((UNIT_FIELDS, max_tiles)), new((2,)), size, current_stream(permutation.expert_of_tile.device))
    chunk = min(MAX_CHUNK, triton.next_power_of_2(max(max_tiles, 1)))
    _kernel_of(size, permutation.tile_rows, chunk, uses_pdl).launch(
        (1, 1, 1),
        permutation.expert_of_tile,
        permutation.row_limit_of_tile,
        permutation.num_tiles,
        units.records,
        units.counts,
        numbers=(max_tiles,),
    )
    return units


@functools.cache
def _kernel_of(size: UnitSize, tile_rows: int, chunk: int, uses_pdl: bool) -> TritonKernel:
    return TritonKernel(
        plan_units_kernel,
        TILE_ROWS=tile_rows,
        UNIT_ROWS=size.max_rows,
        ROW_MULTIPLE=size.multiple,
        MAX_GROUP_UNITS=size.max_group,
        CHUNK=chunk,
        USES_PDL=uses_pdl,
        num_warps=8 if chunk >= 512 else 4,
        launch_pdl=uses_pdl,
    )


def plan_units_reference(permutation: Permutation, size: UnitSize) -> RowUnits:
    """The same in plain Python, on the CPU."""
    num_tiles = int(permutation.num_tiles)
    experts = permutation.expert_of_tile[:num_tiles].tolist()
    limits = permutation.row_limit_of_tile[:num_tiles].tolist()
    records: list[tuple[int, int, int, int, int]] = []
    for expert in dict.fromkeys(experts):
        start = experts.index(expert) * permutation.tile_rows
        limit = limits[experts.index(expert)]
        most_units = -(-(limit - start) // size.max_rows)
        step = -(-(limit - start) // (most_units * size.multiple)) * size.multiple
        first_rows = list(range(start, limit, step))
        num_groups = -(-len(first_rows) // size.max_group)
        group_units = -(-len(first_rows) // num_groups)
        first_unit = len(records)
        for index, row in enumerate(first_rows):
            in_group = index // group_units * group_units
            in_this_group = min(group_units, len(first_rows) - in_group)
            records.append((expert, row, min(step, limit - row), first_unit + in_group, in_this_group))
    columns = torch.full((UNIT_FIELDS, permutation.max_tiles), -1, dtype=torch.int32)
    columns[:, : len(records)] = torch.tensor(records, dtype=torch.int32).reshape(-1, UNIT_FIELDS).T
    return RowUnits(columns, torch.tensor([len(records), 0], dtype=torch.int32), size, stream=0)
