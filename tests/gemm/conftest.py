"""Runs the contract of `gemm/contract.py` with what the FAMILY of a test module takes."""

from __future__ import annotations

import pytest
import torch
from gemm.family import AXES, Family


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.function.__module__.endswith("contract"):
        return
    for name in metafunc.fixturenames:
        if name in AXES:
            values, ids = AXES[name]
            metafunc.parametrize(name, values(metafunc.module.FAMILY), ids=ids)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    return request.module.FAMILY


@pytest.fixture
def hopper(cuda: torch.device) -> torch.device:
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("not a Hopper")
    return cuda
