"""What both families of Hopper GEMMs do beside `gemm/contract.py`: units that a planner made, and what they refuse.

A family's test module says `UNIT_SIZE` and `REFUSED_TILE_ROWS` too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm.family import Problem
from gemm.hopper.cases import permutation_of_counts
from gemm.hopper.offline import empty

from moe.gemm.config import GemmConfig, WeightFormat
from moe.gemm.hopper.work_units import plan_units


@pytest.mark.parametrize("is_gemm1", [True, False], ids=["gemm1", "gemm2"])
def test_gemms_that_share_the_planners_units_leave_their_counter_at_zero(
    request, family, hopper, poisoned_memory, few_tile_rows, is_gemm1
):
    problem = Problem("Swiglu" if is_gemm1 else None, family.usual_dims, WeightFormat())
    loads = list(family.loads["several_tiles"]) * 4
    case = family.case(problem, loads=loads, tile_rows=few_tile_rows, device=hopper)
    expected = case.by_slot(family.run(case))
    units = plan_units(case.permutation, request.module.UNIT_SIZE)
    shared = replace(case, permutation=replace(case.permutation, units=units))
    num_units = int(units.counts[0])
    for uses_pdl in (False, True, True):
        assert torch.equal(case.by_slot(family.run(shared, uses_pdl=uses_pdl)), expected)
        assert units.counts.tolist() == [num_units, 0]


def test_other_row_tiles_are_refused_with_who_takes_them(request, family, usual):
    activation, (in_features, out_features) = usual.activation, usual.dims
    config = GemmConfig(
        num_experts=1,
        in_features=in_features,
        out_features=out_features,
        activation=activation,
        weight_format=usual.weight_format,
    )
    gemm, stage = (family.gemm1, "gemm1") if activation else (family.gemm2, "gemm2")
    for tile_rows in request.module.REFUSED_TILE_ROWS:
        permutation = permutation_of_counts([5], tile_rows, 5)
        rows = empty(5 if activation else permutation.max_rows, in_features)
        with pytest.raises(ValueError, match=f"tile_rows={tile_rows}; use portable_{stage}"):
            gemm(rows, empty(*config.weight_shape), permutation, config=config)


SHUFFLED_MAJOR_MN = WeightFormat(layout="MajorMn", is_shuffled=True)


@pytest.mark.parametrize(
    ("is_gemm1", "change", "says"),
    [
        (True, {"activation": "Situ"}, "expected Gelu or "),
        (False, {"activation": "Relu2"}, "expected no activation"),
        (True, {"weight_format": SHUFFLED_MAJOR_MN}, "no shuffled MajorMn weights"),
        (False, {"weight_format": SHUFFLED_MAJOR_MN}, "no shuffled MajorMn weights"),
        (True, {"in_features": 64}, "a contraction of more than 64"),
        (False, {"in_features": 64}, "a contraction of more than 64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_problems_of_other_families_are_refused_with_who_takes_them(family, is_gemm1, change, says):
    fields = {"num_experts": 1, "in_features": 128, "out_features": 128, "activation": "Swiglu" if is_gemm1 else None}
    config = GemmConfig(**fields | change)
    permutation = permutation_of_counts([5], 64, 5)
    gemm, stage = (family.gemm1, "gemm1") if is_gemm1 else (family.gemm2, "gemm2")
    rows = empty(5 if is_gemm1 else permutation.max_rows, config.in_features)
    with pytest.raises(ValueError, match=f"{says}.*; use portable_{stage}"):
        gemm(rows, empty(*config.weight_shape), permutation, config=config)


def test_no_tokens_give_no_rows_and_no_launch(family):
    permutation = permutation_of_counts([0], 64, 0, extra_tiles=0)
    for gemm, activation in ((family.gemm1, "Swiglu"), (family.gemm2, None)):
        config = GemmConfig(num_experts=1, in_features=128, out_features=128, activation=activation)
        assert gemm(empty(0, 128), empty(*config.weight_shape), permutation, config=config).shape == (0, 128)
