"""What every kernel of a backward stage does: each stage alone, against its reference in float64.

A module of kernels says `STAGES`, by the names of `moe/gemm/backward/kernels.py`, `TILE_ROWS`, `DIMS` and `FORMATS`, has the fixture
`backward_device`, and imports all of this with a star.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from gemm.backward.cases import BackwardCase, make_backward_case
from gemm.cases import ids_of_loads, poisoned
from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm.backward.reference import (
    gemm1_dgrad_reference,
    gemm1_keeping_reference,
    gemm1_wgrad_reference,
    gemm2_dgrad_reference,
    gemm2_wgrad_reference,
)
from moe.gemm.config import GemmConfig, WeightLayout
from moe.testing.closeness import MAX_RELATIVE_FROBENIUS, assert_close_to_exact, relative_error

LOADS = {
    "edges_of_tiles": [1, 16, 0, 17],
    "edges_of_steps": [63, 64, 65, 0, 0, 127, 128, 129, 2],
    "one_expert_takes_all": [0, 0, 301, 0],
    "nobody": [0, 0],
}
NAN = float("nan")


class Inputs(NamedTuple):
    """What the five stages read, each in bf16 and chained by the references; padding rows are as each stage may find them."""

    case: BackwardCase
    gate_up: Tensor  # padding rows NaN
    grad_gate_up: Tensor  # padding rows 0, rows from num_rows on NaN
    weighted: Tensor  # the same

    @property
    def gemm1(self) -> GemmConfig:
        return self.case.config.gemm1

    @property
    def gemm2(self) -> GemmConfig:
        return self.case.config.gemm2


def make_inputs(loads: list[int] | None, device: torch.device, **arguments: Any) -> Inputs:
    if loads is not None:
        ids = ids_of_loads(loads)
        arguments |= {"expert_ids": ids, "num_experts": len(loads), "num_tokens": len(ids)}
    case = make_backward_case(device=device, **arguments)
    case = case._replace(permutation=poisoned(case.permutation, -1))
    kept = gemm1_keeping_reference(*case[3:5], case.permutation, config=case.config.gemm1, swiglu=case.swiglu)
    is_real = rows_of_slots(case.permutation)
    gate_up = torch.where(is_real[:, None], kept.gate_up, NAN)
    second = gemm2_dgrad_reference(*case.grad_arguments(gate_up), **case.both_configs(), swiglu=case.swiglu)
    is_used = torch.arange(case.permutation.max_rows, device=device)[:, None] < case.permutation.num_rows
    grad_gate_up, weighted = (torch.where(is_used, rows, NAN) for rows in second[:2])
    return Inputs(case, gate_up, grad_gate_up, weighted)


def rows_of_slots(permutation: Permutation) -> Tensor:
    """[P] bool: the rows that a slot has."""
    is_real = torch.zeros(permutation.max_rows, dtype=torch.bool, device=permutation.token_of_row.device)
    is_real[permutation.row_of_slot[permutation.row_of_slot >= 0].long()] = True
    return is_real


def stage_arguments(name: str, inputs: Inputs, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Any], dict[str, Any]]:
    """What a stage is called with, its tensors in bf16, or all in another dtype for the exact result."""
    case, permutation = inputs.case, inputs.case.permutation

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype == torch.bfloat16 else tensor.to(dtype)

    topk = replace(case.topk, weights=cast(case.topk.weights))
    swiglu = case.swiglu
    if swiglu is not None and dtype != torch.bfloat16:
        swiglu = SwigluParams(
            *(None if p is None else p.to(dtype) for p in (swiglu.alpha, swiglu.beta, swiglu.clamp_limit))
        )
    match name:
        case "gemm1_keeping":
            return [cast(case.hidden_states), cast(case.w1), permutation], {"config": inputs.gemm1, "swiglu": swiglu}
        case "gemm2_dgrad":
            positional = [cast(case.grad_output), cast(case.w2), cast(inputs.gate_up), topk, permutation]
            return positional, {"config": inputs.gemm2, "gemm1": inputs.gemm1, "swiglu": swiglu}
        case "gemm1_dgrad":
            return [cast(inputs.grad_gate_up), cast(case.w1), permutation], {"config": inputs.gemm1}
        case "gemm1_wgrad":
            return [cast(inputs.grad_gate_up), cast(case.hidden_states), permutation], {"config": inputs.gemm1}
        case "gemm2_wgrad":
            return [cast(case.grad_output), cast(inputs.weighted), permutation], {"config": inputs.gemm2}
    raise AssertionError(name)


REFERENCES: dict[str, Callable[..., Any]] = {
    "gemm1_keeping": gemm1_keeping_reference,
    "gemm2_dgrad": gemm2_dgrad_reference,
    "gemm1_dgrad": gemm1_dgrad_reference,
    "gemm1_wgrad": gemm1_wgrad_reference,
    "gemm2_wgrad": gemm2_wgrad_reference,
}


def run_stage(stages: dict[str, Callable[..., Any]], name: str, inputs: Inputs, **more: Any) -> tuple[Tensor, ...]:
    positional, named = stage_arguments(name, inputs)
    results = stages[name](*positional, **named, **more)
    return results if isinstance(results, tuple) else (results,)


def run_reference(name: str, inputs: Inputs, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    positional, named = stage_arguments(name, inputs, dtype)
    results = REFERENCES[name](*positional, **named)
    return results if isinstance(results, tuple) else (results,)


def assert_is_close(stages: dict[str, Callable[..., Any]], name: str, inputs: Inputs) -> None:
    is_real = rows_of_slots(inputs.case.permutation)
    is_used = torch.arange(len(is_real), device=is_real.device) < inputs.case.permutation.num_rows
    results = run_stage(stages, name, inputs)
    exact, reference = run_reference(name, inputs, torch.float64), run_reference(name, inputs)
    for number, (actual, wanted, bf16) in enumerate(zip(results, exact, reference, strict=True)):
        if name == "gemm2_dgrad" and number == 2:
            assert actual.dtype == torch.float32
            assert relative_error(actual, wanted) <= MAX_RELATIVE_FROBENIUS
            assert not actual[inputs.case.permutation.row_of_slot < 0].any(), "exact zeros without a row"
        elif name.endswith("wgrad"):
            assert_close_to_exact(actual.flatten(0, 1), bf16.flatten(0, 1), wanted.flatten(0, 1))
            assert not actual[experts_without_rows(inputs)].any(), "exact zeros without rows"
        else:
            assert_close_to_exact(actual[is_real], bf16[is_real], wanted[is_real])
            if name == "gemm2_dgrad":
                assert not actual[is_used & ~is_real].any(), "padding rows are exact zeros"


def experts_without_rows(inputs: Inputs) -> Tensor:
    permutation = inputs.case.permutation
    experts = permutation.expert_of_tile[: int(permutation.num_tiles)].long()
    return torch.bincount(experts, minlength=inputs.gemm1.num_experts) == 0


@pytest.fixture
def stages(request: pytest.FixtureRequest) -> dict[str, Callable[..., Any]]:
    return request.module.STAGES


@pytest.mark.parametrize("load", LOADS)
def test_each_stage_is_near_float64(stages, stage, backward_device, poisoned_memory, load, tile_rows, usual_dims):
    inputs = make_inputs(LOADS[load], backward_device, **usual_dims, tile_rows=tile_rows)
    assert_is_close(stages, stage, inputs)


def test_each_format_and_activation(stages, stage, backward_device, poisoned_memory, few_tile_rows, dims, kind):
    activation, weight_format = kind
    arguments = dims | {"activation": activation, "weight_format": weight_format, "tile_rows": few_tile_rows}
    assert_is_close(stages, stage, make_inputs([20, 0, 3, few_tile_rows], backward_device, **arguments))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_few_tokens_on_one_rank_of_several(
    stages, stage, backward_device, poisoned_memory, few_tile_rows, usual_dims, num_tokens
):
    arguments = usual_dims | {"num_experts": 8, "num_local_experts": 3, "local_expert_offset": 2, "top_k": 4}
    inputs = make_inputs(None, backward_device, **arguments, num_tokens=num_tokens, tile_rows=few_tile_rows)
    assert_is_close(stages, stage, inputs)


@pytest.mark.parametrize("names", [("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")], ids=str)
def test_parameters_of_swiglu_by_local_expert(
    stages, backward_device, poisoned_memory, few_tile_rows, usual_dims, names
):
    # Limits lie halfway between two numbers of bf16, so that what is kept is clamped where the product is.
    values = {
        "alpha": [1.699, 0.502, 1.004],
        "beta": [1.004, -0.251, 0.0],
        "clamp_limit": [0.701171875, 7.015625, 1.00390625],
    }
    swiglu = SwigluParams(**{name: torch.tensor(values[name], device=backward_device) for name in names})
    inputs = make_inputs([37, 0, 20], backward_device, **usual_dims, tile_rows=few_tile_rows, swiglu=swiglu)
    for stage in ("gemm1_keeping", "gemm2_dgrad"):
        if stage in stages:
            assert_is_close(stages, stage, inputs)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_routing_weights_of_both_dtypes(
    stages, backward_device, poisoned_memory, few_tile_rows, usual_dims, weight_dtype
):
    if "gemm2_dgrad" not in stages:
        pytest.skip("not among these kernels")
    arguments = usual_dims | {"weight_dtype": weight_dtype, "tile_rows": few_tile_rows}
    assert_is_close(stages, "gemm2_dgrad", make_inputs([37, 0, 20], backward_device, **arguments))


@pytest.mark.parametrize("layout", [WeightLayout.MajorK, WeightLayout.MajorMn], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["gemm1_wgrad", "gemm2_wgrad"])
def test_weight_gradients_are_added_in_float32(
    stages, backward_device, poisoned_memory, few_tile_rows, usual_dims, formats, name, layout
):
    weight_format = next((f for f in formats if f.layout is layout), None)
    if name not in stages or weight_format is None:
        pytest.skip("not among these kernels")
    arguments = usual_dims | {"weight_format": weight_format, "tile_rows": few_tile_rows}
    inputs = make_inputs([37, 0, 150], backward_device, **arguments)
    (exact,) = run_reference(name, inputs, torch.float64)
    before = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(backward_device)
    buffer = before.clone()
    (returned,) = run_stage(stages, name, inputs, out=buffer)
    assert returned is buffer
    assert relative_error(buffer, before + exact) <= 1e-6
    is_empty = experts_without_rows(inputs)
    assert is_empty.any()
    assert torch.equal(buffer[is_empty], before[is_empty])


def test_the_same_bits_in_twenty_runs(stages, stage, backward_gpu, poisoned_memory, tile_rows):
    arguments = {"hidden_size": 2048, "intermediate_size": 768, "tile_rows": tile_rows}
    inputs = make_inputs([700, 333, 0, 1290, 5] * 3, backward_gpu, **arguments)
    is_real = rows_of_slots(inputs.case.permutation)

    def results() -> list[Tensor]:
        found = run_stage(stages, stage, inputs)
        return [rows[is_real] if len(rows) == len(is_real) else rows for rows in found]

    first = results()
    for _ in range(20):
        assert all(map(torch.equal, first, results()))


def test_sums_that_fp32_holds_exactly_equal_float64(stages, backward_device, few_tile_rows, usual_dims):
    """Small integers: each row of an expert counts once, and none of another expert's."""
    inputs = make_inputs([70, 0, 3, 129], backward_device, **usual_dims, tile_rows=few_tile_rows)
    generator = torch.Generator().manual_seed(3)

    def integers(like: Tensor) -> Tensor:
        drawn = torch.randint(-3, 4, like.shape, generator=generator).to(like)
        return torch.where(like.isnan(), like, drawn)

    case = inputs.case
    is_real = rows_of_slots(case.permutation)[:, None]
    grad_gate_up, weighted = (
        torch.where(is_real, integers(rows), rows) for rows in (inputs.grad_gate_up, inputs.weighted)
    )
    case = case._replace(
        hidden_states=integers(case.hidden_states), grad_output=integers(case.grad_output), w1=integers(case.w1)
    )
    inputs = Inputs(case, inputs.gate_up, grad_gate_up, weighted)
    for name in ("gemm1_wgrad", "gemm2_wgrad", "gemm1_dgrad"):
        if name not in stages:
            continue
        (actual,), (exact,) = run_stage(stages, name, inputs), run_reference(name, inputs, torch.float64)
        if name == "gemm1_dgrad":
            actual, exact = actual[is_real[:, 0]], exact[is_real[:, 0]]
        assert torch.equal(actual, exact.bfloat16()), name
