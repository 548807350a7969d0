"""The torch GEMMs against float64."""

from __future__ import annotations

import pytest
import torch
from gemm.cases import ALL_FORMATS, UNGATED_FORMATS, GemmCase, format_id, make_case
from gemm.family import run_reference

from moe.flow import SwigluParams
from moe.gemm.config import FLASHINFER
from moe.testing.closeness import assert_close_to_exact, assert_rounded_once


def assert_is_rounded_truth(case: GemmCase, swiglu: SwigluParams | None = None) -> None:
    exact = case.exact(swiglu).flatten(0, 1)
    actual = case.by_slot(run_reference(case, swiglu)).flatten(0, 1)
    assert_close_to_exact(actual, exact.to(torch.bfloat16), exact)
    assert_rounded_once(actual, exact)


@pytest.mark.parametrize("weight_format", ALL_FORMATS, ids=format_id)
def test_gemm1_with_swiglu(poisoned_memory, weight_format):
    assert_is_rounded_truth(
        make_case(in_features=192, out_features=80, activation="Swiglu", weight_format=weight_format)
    )


@pytest.mark.parametrize("weight_format", UNGATED_FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Relu2", None])
def test_gemms_without_gate(poisoned_memory, activation, weight_format):
    assert_is_rounded_truth(
        make_case(in_features=64, out_features=160, activation=activation, weight_format=weight_format)
    )


@pytest.mark.parametrize("activation", ["Swiglu", "Relu2", None])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_few_tokens_and_odd_dims(poisoned_memory, num_tokens, activation):
    case = make_case(in_features=40, out_features=72, activation=activation, num_tokens=num_tokens, num_experts=11)
    assert run_reference(case).shape == (case.permutation.max_rows, 72)
    assert_is_rounded_truth(case)


@pytest.mark.parametrize("activation", ["Swiglu", None])
def test_one_rank_of_several(poisoned_memory, activation):
    arguments = {"in_features": 64, "out_features": 32, "num_experts": 8, "num_tokens": 9}
    assert_is_rounded_truth(make_case(**arguments, activation=activation, local=slice(3, 6)))


@pytest.mark.parametrize(
    "names", [(), ("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")], ids=str
)
def test_swiglu_parameters_by_local_expert(names):
    # Halfway between two numbers of bf16.
    parameters = {
        "alpha": torch.tensor([1.699, 0.502, 1.004]),
        "beta": torch.tensor([1.004, -0.251, 0.0]),
        "clamp_limit": torch.tensor([0.502, 7.015, -1.004]),
    }
    swiglu = SwigluParams(**{name: parameters[name] for name in names})
    case = make_case(in_features=128, out_features=32, activation="Swiglu", num_tokens=12, seed=3)
    assert_is_rounded_truth(case, swiglu)


@pytest.mark.parametrize("activation", ["Swiglu", None])
def test_autocast_changes_no_bit(activation):
    case = make_case(in_features=192, out_features=80, activation=activation)
    expected = case.by_slot(run_reference(case))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.by_slot(run_reference(case)), expected)


def test_wide_sums_as_those_of_qwen3_30b():
    arguments = {"num_experts": 8, "num_tokens": 16, "top_k": 2, "weight_format": FLASHINFER}
    assert_is_rounded_truth(make_case(in_features=2048, out_features=768, activation="Swiglu", **arguments))
    assert_is_rounded_truth(make_case(in_features=768, out_features=2048, **arguments))
