"""Device functions: what follows from where an expert's rows begin and how many slots it has: tiles, padding, units."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moe.flow import UnitSize
from moe.permute.numba_block import PlanBlock
from moe.permute.numba_count_device import NOT_LOCAL
from moe.runtime.numba_warp_device import device_function

_ONE = np.uint32(1)
_NO_UNITS = UnitSize(1, 1, 1)


class Maps(NamedTuple):
    """What a plan writes, but its totals."""

    row_of_slot_ptr: Any  # [T, K] int32
    token_of_row_ptr: Any  # [P] int32
    expert_of_tile_ptr: Any  # [P / tile_rows] int32
    row_limit_of_tile_ptr: Any  # [P / tile_rows] int32
    tile_shift: np.int32  # tile_rows = 1 << tile_shift
    unit_records_ptr: Any  # [5, max_units] int32, as moe.flow.RowUnits
    max_units: np.int32


class Segment(NamedTuple):
    """The rows of an expert."""

    expert: np.int32
    first_tile: np.int32
    num_slots: np.int32
    first_unit: np.int32


@device_function
def num_tiles_of(num_slots: np.int32, tile_shift: np.int32) -> np.int32:
    most_added = np.int32(np.int32(np.int32(1) << tile_shift) - np.int32(1))
    return np.int32(np.int32(num_slots + most_added) >> tile_shift)


@device_function
def num_units_of(num_slots: np.int32, max_rows: int) -> np.int32:
    return np.int32(np.uint32(num_slots + max_rows - 1) // np.uint32(max_rows))


def build_write_around(block: PlanBlock) -> Any:
    """(maps, segment, writer): a writer's share of what is known of an expert's rows without its slots."""
    WRITERS = block.num_writers
    WRITES_UNITS = block.unit_size is not None
    write_units = _build_write_units(block.unit_size or _NO_UNITS, WRITERS)

    @device_function
    def write_around(maps: Maps, segment: Segment, writer: np.int32) -> None:
        write_tiles_and_padding(maps, segment, writer, WRITERS)
        if WRITES_UNITS:
            write_units(maps, segment, writer)

    return write_around


@device_function
def write_tiles_and_padding(maps: Maps, segment: Segment, writer: np.int32, num_writers: int) -> None:
    """Write what is known of an expert's rows before its slots are placed; its writers share the work."""
    first_tile, tile_shift = segment.first_tile, maps.tile_shift
    limit = np.int32((first_tile << tile_shift) + segment.num_slots)
    tile_limit = np.int32(first_tile + num_tiles_of(segment.num_slots, tile_shift))
    row_limit = np.int32(tile_limit << tile_shift)
    tile = np.int32(first_tile + writer)
    while tile < tile_limit:
        maps.expert_of_tile_ptr[tile] = segment.expert
        maps.row_limit_of_tile_ptr[tile] = limit
        tile = np.int32(tile + np.int32(num_writers))
    row = np.int32(limit + writer)
    while row < row_limit:
        maps.token_of_row_ptr[row] = NOT_LOCAL
        row = np.int32(row + np.int32(num_writers))


def _build_write_units(size: UnitSize, num_writers: int) -> Any:
    """(maps, segment, writer): write the units of an expert, of even size and in groups of even size; its writers share the work."""
    WRITERS = num_writers
    MAX_ROWS, MULTIPLE, MAX_GROUP = size.max_rows, size.multiple, size.max_group

    @device_function
    def write_units(maps: Maps, segment: Segment, writer: np.int32) -> None:
        records_ptr, max_units = maps.unit_records_ptr, maps.max_units
        num_slots, first_unit = segment.num_slots, segment.first_unit
        first_row = np.int32(segment.first_tile << maps.tile_shift)
        num_units = num_units_of(num_slots, MAX_ROWS)
        most = np.uint32(np.uint32(num_units) * np.uint32(MULTIPLE))
        num_groups = np.uint32(np.uint32(np.uint32(num_units) + np.uint32(MAX_GROUP - 1)) // np.uint32(MAX_GROUP))
        unit = writer
        while unit < num_units:
            unit_rows = np.int32(np.uint32(np.uint32(np.uint32(num_slots) + most - _ONE) // most) * np.uint32(MULTIPLE))
            group_units = np.uint32(np.uint32(np.uint32(num_units) + num_groups - _ONE) // num_groups)
            in_group = np.int32(np.uint32(np.uint32(unit) // group_units) * group_units)
            start = np.int32(unit * unit_rows)
            place = np.int64(first_unit + unit)
            records_ptr[place] = segment.expert
            records_ptr[place + max_units] = np.int32(first_row + start)
            records_ptr[place + 2 * max_units] = min(unit_rows, np.int32(num_slots - start))
            records_ptr[place + 3 * max_units] = np.int32(first_unit + in_group)
            records_ptr[place + 4 * max_units] = min(np.int32(group_units), np.int32(num_units - in_group))
            unit = np.int32(unit + np.int32(WRITERS))

    return write_units
