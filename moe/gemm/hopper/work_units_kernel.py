"""Tile list -> units of rows, grouped by expert. One program walks the list."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def maximum_of(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["max_units"])
def plan_units_kernel(
    expert_of_tile_ptr,  # [P / TILE_ROWS] int32
    row_limit_of_tile_ptr,  # [P / TILE_ROWS] int32
    num_tiles_ptr,  # [1] int32
    units_ptr,  # [5, max_units] int32: expert, first row, real rows, first unit of the group, units of the group
    counts_ptr,  # [2] int32: units, work taken
    max_units,
    TILE_ROWS: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,
    MAX_GROUP_UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    USES_PDL: tl.constexpr,
):
    if USES_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(num_tiles_ptr)
    num_units = 0
    run_start = 0  # first tile of the expert that the last chunk ended in
    for first_tile in range(0, num_tiles, CHUNK):
        tile = first_tile + tl.arange(0, CHUNK)
        in_list = tile < num_tiles
        expert = tl.load(expert_of_tile_ptr + tile, mask=in_list, other=-1)
        before = tl.load(expert_of_tile_ptr + tile - 1, mask=in_list & (tile > 0), other=-1)
        limit = tl.load(row_limit_of_tile_ptr + tile, mask=in_list, other=0)
        start = tl.where(in_list & (expert != before), tile, run_start)
        start = tl.associative_scan(start, 0, maximum_of)

        # An expert has no more units than tiles: its tile number i stands for unit number i.
        rows_of_run = limit - start * TILE_ROWS
        units_of_run = tl.maximum((rows_of_run + UNIT_ROWS - 1) // UNIT_ROWS, 1)
        unit_rows = (rows_of_run + units_of_run - 1) // units_of_run
        unit_rows = tl.maximum((unit_rows + ROW_MULTIPLE - 1) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        units_of_run = (rows_of_run + unit_rows - 1) // unit_rows
        unit_in_run = tile - start
        is_unit = in_list & (unit_in_run < units_of_run)
        unit = num_units + tl.cumsum(is_unit.to(tl.int32), 0) - 1
        num_groups = (units_of_run + MAX_GROUP_UNITS - 1) // MAX_GROUP_UNITS
        group_units = tl.maximum((units_of_run + num_groups - 1) // tl.maximum(num_groups, 1), 1)
        unit_in_group = unit_in_run % group_units
        left_in_run = units_of_run - (unit_in_run - unit_in_group)

        first_row = start * TILE_ROWS + unit_in_run * unit_rows
        record_ptrs = units_ptr + unit
        tl.store(record_ptrs, expert, mask=is_unit)
        tl.store(record_ptrs + max_units, first_row, mask=is_unit)
        tl.store(record_ptrs + 2 * max_units, tl.minimum(limit - first_row, unit_rows), mask=is_unit)
        tl.store(record_ptrs + 3 * max_units, unit - unit_in_group, mask=is_unit)
        tl.store(record_ptrs + 4 * max_units, tl.minimum(group_units, left_in_run), mask=is_unit)
        num_units += tl.sum(is_unit.to(tl.int32), 0)
        run_start = tl.max(start, 0)
    tl.store(counts_ptr, num_units)
    tl.store(counts_ptr + 1, 0)
