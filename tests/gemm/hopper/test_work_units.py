"""The order of work of the Hopper GEMMs, against plain Python."""

from dataclasses import replace

import pytest
import torch
from gemm.hopper.cases import permutation_of_counts

from moe.gemm.hopper import work_units
from moe.gemm.hopper.work_units import plan_units, plan_units_reference, units_of
from moe.gemm.swapped.tile import SWAPPED_UNITS
from moe.gemm.wide.tile import WIDE_UNITS

COUNTS = {
    "docstring": [150, 0, 8],
    "one_expert_takes_all": [0, 0, 5000, 0],
    "edges_of_tiles": [1, 63, 64, 65, 127, 128, 129, 191, 192, 193],
    "just_over_a_group": [128 * 23, 1],
    "nobody": [0, 0],
    "random": [314, 0, 77, 512, 3, 699, 128, 0, 0, 256, 41],
}


# a size of units, and the tile_rows that go with it
PLANS = {f"wide-tile_rows{tile_rows}": (WIDE_UNITS, tile_rows) for tile_rows in (64, 128)} | {
    f"swapped-tile_rows{tile_rows}": (SWAPPED_UNITS, tile_rows) for tile_rows in (16, 32, 64, 128)
}


@pytest.mark.parametrize(("size", "tile_rows"), PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("chunk", [8, 1024], ids="chunk{}".format)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_units_are_those_of_the_reference(triton_device, monkeypatch, counts, chunk, size, tile_rows):
    monkeypatch.setattr(work_units, "MAX_CHUNK", chunk)
    permutation = permutation_of_counts(counts, tile_rows, 16, device=triton_device)
    schedule = plan_units(permutation, size)
    expected = plan_units_reference(permutation, size)
    assert schedule.counts.tolist() == expected.counts.tolist()
    num_units = int(expected.counts[0])
    assert torch.equal(schedule.records[:, :num_units].cpu(), expected.records[:, :num_units])


@pytest.mark.parametrize("tile_rows", [64, 128], ids="tile_rows{}".format)
def test_the_order_takes_every_column_block_of_every_unit_once(tile_rows):
    num_blocks = 3
    schedule = plan_units_reference(permutation_of_counts(COUNTS["random"] + [4000], tile_rows, 16), WIDE_UNITS)
    num_units = int(schedule.counts[0])
    _, _, _, group_first, group_size = schedule.records.tolist()
    taken = []
    for work in range(num_units * num_blocks):
        first, size = group_first[work // num_blocks], group_size[work // num_blocks]
        place = work - first * num_blocks
        taken.append((first + place % size, place // size))
    assert sorted(taken) == [(unit, block) for unit in range(num_units) for block in range(num_blocks)]


@pytest.mark.parametrize(("size", "tile_rows"), PLANS.values(), ids=PLANS)
def test_units_hold_every_real_row_once(size, tile_rows):
    counts = [*COUNTS["random"], *COUNTS["edges_of_tiles"], 160, 161, 320, 321]
    permutation = permutation_of_counts(counts, tile_rows, 16)
    schedule = plan_units_reference(permutation, size)
    experts, first_rows, num_rows, _, _ = schedule.records[:, : int(schedule.counts[0])].tolist()
    covered = torch.zeros(permutation.max_rows, dtype=torch.int32)
    for first_row, rows in zip(first_rows, num_rows):
        assert rows <= size.max_rows
        covered[first_row : first_row + rows] += 1
    assert torch.equal(covered, (permutation.token_of_row >= 0).int())
    assert sorted(set(experts)) == [expert for expert, count in enumerate(counts) if count]


def test_an_expert_of_several_units_shares_its_rows_evenly():
    permutation = permutation_of_counts([170, 500], 16, 16)
    schedule = plan_units_reference(permutation, SWAPPED_UNITS)
    assert schedule.records[:3, :6].tolist() == [
        [0, 0, 1, 1, 1, 1],
        [0, 96, 176, 304, 432, 560],
        [96, 74, 128, 128, 128, 116],
    ]


def test_units_are_not_shared_with_another_stream(hopper):
    permutation = permutation_of_counts([300, 20], 128, 517, device=hopper)
    permutation = replace(permutation, units=plan_units(permutation, WIDE_UNITS))
    assert units_of(permutation, WIDE_UNITS) is permutation.units
    assert units_of(permutation, SWAPPED_UNITS) is not permutation.units
    with torch.cuda.stream(torch.cuda.Stream()):
        assert units_of(permutation, WIDE_UNITS) is not permutation.units
