"""The portable kernels of the backward stages, in Triton's interpreter or on the GPU: the contract, and what they alone do."""

from __future__ import annotations

import pytest
import torch
from gemm.cases import GARBAGE

from moe.gemm.config import WeightFormat

pytest.importorskip("triton")
from gemm.backward.stage_tests import *  # noqa: F403
from gemm.backward.stage_tests import assert_is_close, make_inputs, rows_of_slots

from moe.gemm.backward.dgrad import portable_gemm1_dgrad, portable_gemm2_dgrad
from moe.gemm.backward.keeping import portable_gemm1_keeping
from moe.gemm.backward.wgrad import (
    portable_gemm1_wgrad,
    portable_gemm2_wgrad,
    rows_of_experts,
)
from moe.gemm.portable.gemm1 import portable_gemm1

STAGES = {
    "gemm1_keeping": portable_gemm1_keeping,
    "gemm2_dgrad": portable_gemm2_dgrad,
    "gemm1_dgrad": portable_gemm1_dgrad,
    "gemm1_wgrad": portable_gemm1_wgrad,
    "gemm2_wgrad": portable_gemm2_wgrad,
}
ACTIVATIONS = ("Swiglu", "Relu2")
FORMATS = [
    WeightFormat(layout=layout, gate_up_order=order)
    for layout in ("MajorK", "MajorMn")
    for order in ("gate_up", "up_gate")
]
TILE_ROWS = (16, 64, 128)
DIMS = [
    {"hidden_size": 72, "intermediate_size": 136},
    {"hidden_size": 8, "intermediate_size": 8},
    {"hidden_size": 264, "intermediate_size": 40},
]


@pytest.fixture
def backward_device(triton_device: torch.device) -> torch.device:
    return triton_device


@pytest.fixture
def backward_gpu(cuda: torch.device) -> torch.device:
    return cuda


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_keeps_has_the_bits_of_what_does_not(triton_device, poisoned_memory, activation):
    case = make_inputs([37, 0, 20], triton_device, **DIMS[0], activation=activation).case
    arguments = (case.hidden_states, case.w1, case.permutation)
    is_real = rows_of_slots(case.permutation)
    kept = portable_gemm1_keeping(*arguments, config=case.config.gemm1)
    assert torch.equal(kept.activation[is_real], portable_gemm1(*arguments, config=case.config.gemm1)[is_real])


@pytest.mark.parametrize("name", STAGES)
def test_padding_rows_are_not_read(triton_device, poisoned_memory, name):
    inputs = make_inputs([37, 0, 20], triton_device, **DIMS[0])
    permutation = inputs.case.permutation
    is_real = rows_of_slots(permutation)
    permutation.token_of_row[~is_real] = GARBAGE
    inputs.grad_gate_up[~is_real] = torch.nan
    inputs.weighted[~is_real] = torch.nan
    assert_is_close(STAGES, name, inputs)


def test_experts_without_rows_are_cleared_and_no_other(triton_device, poisoned_memory):
    permutation = make_inputs([37, 0, 20, 0], triton_device, **DIMS[0]).case.permutation
    grad = torch.full((4, 72, 136), 7.0, dtype=torch.bfloat16, device=triton_device)
    rows = rows_of_experts(permutation, 4, grad)
    assert rows.tolist() == rows_of_experts(permutation, 4).tolist() == [0, 0, 48, 0, 37, 0, 68, 0, 0]
    assert [expert.unique().tolist() for expert in grad] == [[7.0], [0.0], [7.0], [0.0]]


def test_experts_are_found_among_more_tiles_than_a_program_looks_at_in_one_go(
    triton_device, poisoned_memory, monkeypatch
):
    monkeypatch.setattr("moe.gemm.backward.wgrad.MAX_CHUNK", 2)
    permutation = make_inputs([37, 0, 20, 0, 100, 1], triton_device, **DIMS[0]).case.permutation
    assert rows_of_experts(permutation, 6).tolist() == [0, 0, 48, 0, 80, 192, 37, 0, 68, 0, 180, 193, 0]
    permutation.num_tiles.zero_()
    assert not rows_of_experts(permutation, 6).any()
