"""The order in which Hopper's persistent GEMMs take their work, made on the device from a Permutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe.flow import Permutation
from moe.gemm.hopper_schedule_kernel import plan_units_kernel

UNIT_ROWS = 128  # rows that one block of threads multiplies at a time
UNIT_FIELDS = 5  # expert, first row, real rows, first unit of its group, units of its group
MAX_GROUP_UNITS = 22  # units that share a weight tile while it is in L2; 22 was best of 8, 22 and all on an H200
MAX_CHUNK = 1024  # tiles that the planning kernel takes at a time


@dataclass(frozen=True)
class UnitSchedule:
    """Units of at most `unit_rows` rows of one expert. Work number w, for a GEMM of B column blocks, is

        any_unit = w // B                                                      some unit of the right group
        first, size = first unit and number of units of any_unit's group
        unit = first + (w - first * B) % size;  column block = (w - first * B) // size

    so the units of a group take a column block one after another, then the next one.

    Example, tile_rows=64, unit_rows=128, expert_of_tile [0, 0, 0, 2], row_limit_of_tile [150, 150, 150, 200]:

        expert        0    0    2
        first row     0  128  192
        real rows   128   22    8
        group         0    0    2   (its first unit; the sizes are 2, 2, 1)
    """

    units: Tensor  # [UNIT_FIELDS, max_units] int32; columns from num_units on are undefined
    counts: Tensor  # [2] int32: num_units, and a counter of work taken, 0

    @property
    def max_units(self) -> int:
        return self.units.shape[1]


def plan_units(permutation: Permutation, *, unit_rows: int = UNIT_ROWS, row_multiple: int = UNIT_ROWS) -> UnitSchedule:
    """The units of a permutation whose tile_rows are at most unit_rows.

    An expert has as few units as unit_rows allow. They share its rows evenly, but start at multiples of row_multiple of them.
    """
    max_tiles = permutation.max_tiles
    device = permutation.expert_of_tile.device
    schedule = UnitSchedule(
        torch.empty(UNIT_FIELDS, max_tiles, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
    )
    chunk = min(MAX_CHUNK, triton.next_power_of_2(max(max_tiles, 1)))
    with torch.cuda.device_of(permutation.expert_of_tile):
        plan_units_kernel[(1,)](
            permutation.expert_of_tile,
            permutation.row_limit_of_tile,
            permutation.num_tiles,
            schedule.units,
            schedule.counts,
            max_tiles,
            TILE_ROWS=permutation.tile_rows,
            UNIT_ROWS=unit_rows,
            ROW_MULTIPLE=row_multiple,
            MAX_GROUP_UNITS=MAX_GROUP_UNITS,
            CHUNK=chunk,
            num_warps=8 if chunk >= 512 else 4,
        )
    return schedule


def plan_units_reference(
    permutation: Permutation, *, unit_rows: int = UNIT_ROWS, row_multiple: int = UNIT_ROWS
) -> UnitSchedule:
    """The same in plain Python, on the CPU."""
    num_tiles = int(permutation.num_tiles)
    experts = permutation.expert_of_tile[:num_tiles].tolist()
    limits = permutation.row_limit_of_tile[:num_tiles].tolist()
    records: list[tuple[int, int, int, int, int]] = []
    for expert in dict.fromkeys(experts):
        start = experts.index(expert) * permutation.tile_rows
        limit = limits[experts.index(expert)]
        most_units = -(-(limit - start) // unit_rows)
        step = -(-(limit - start) // (most_units * row_multiple)) * row_multiple
        first_rows = list(range(start, limit, step))
        num_groups = -(-len(first_rows) // MAX_GROUP_UNITS)
        group_units = -(-len(first_rows) // num_groups)
        first_unit = len(records)
        for index, row in enumerate(first_rows):
            in_group = index // group_units * group_units
            size = min(group_units, len(first_rows) - in_group)
            records.append((expert, row, min(step, limit - row), first_unit + in_group, size))
    units = torch.full((UNIT_FIELDS, permutation.max_tiles), -1, dtype=torch.int32)
    units[:, : len(records)] = torch.tensor(records, dtype=torch.int32).reshape(-1, UNIT_FIELDS).T
    return UnitSchedule(units, torch.tensor([len(records), 0], dtype=torch.int32))
