"""Stages 2 and 5 by either implementation."""

from __future__ import annotations

import os

import pytest
import torch
from permute.stage import Stage

from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    import emulation.numba_launch  # noqa: F401

KERNELS = [
    pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.gpu]),
    pytest.param("numba", marks=[pytest.mark.simulator, pytest.mark.gpu]),
]


def planner_of(name: str, request: pytest.FixtureRequest) -> Stage:
    if name == "triton":
        device = request.getfixturevalue("triton_device")
        from moe.permute.triton_plan import plan_permutation

        return Stage(plan_permutation, device)
    device = request.getfixturevalue("numba_device")
    from moe.permute.numba_plan import numba_plan_permutation

    return Stage(numba_plan_permutation, device)


@pytest.fixture(params=KERNELS)
def planner(request: pytest.FixtureRequest) -> Stage:
    """Stage 2 by a kernel, in Triton or numba."""
    return planner_of(request.param, request)


@pytest.fixture(params=["reference", *KERNELS])
def plan(request: pytest.FixtureRequest) -> Stage:
    """Stage 2 by the reference or a kernel."""
    if request.param == "reference":
        return Stage(plan_permutation_reference, torch.device("cpu"))
    return planner_of(request.param, request)


@pytest.fixture(params=["reference", pytest.param("kernel", marks=[pytest.mark.interpreter, pytest.mark.gpu])])
def finalize(request: pytest.FixtureRequest) -> Stage:
    if request.param == "reference":
        return Stage(finalize_tokens_reference, torch.device("cpu"))
    from moe.permute.finalize import finalize_tokens

    return Stage(finalize_tokens, request.getfixturevalue("triton_device"))
