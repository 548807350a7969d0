"""Which machine the kernels run on.

A test that asks for `triton_device` or `numba_device` runs the real kernels: on the GPU where there is one, else emulated
on the CPU. Each emulation is fixed when its library is imported, so each is a pytest process of its own:

    pytest -m "not gpu"                            references, checks, offline compiles
    TRITON_INTERPRET=1 pytest -m interpreter       Triton kernels in Triton's interpreter
    NUMBA_ENABLE_CUDASIM=1 pytest -m simulator     routing and permutation kernels in numba's simulator
    pytest -m gpu                                  all kernels on the GPU
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# What tests assert in modules of helpers reads as well as in their own.
for module in (
    "moe.testing.closeness",
    "fused.few_tokens.cases",
    "gemm.backward.stage_tests",
    "gemm.contract",
    "gemm.family",
    "gemm.hopper.contract",
    "gemm.hopper.offline",
):
    pytest.register_assert_rewrite(module)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

if IS_INTERPRETED:
    pass
if IS_SIMULATED:
    import emulation.warp_simulator  # noqa: F401

# No test reads or writes the caches of whoever runs it. Worker processes inherit the first one's folder.
if "MOE_TESTS_CACHE_DIR" not in os.environ:
    os.environ["MOE_TESTS_CACHE_DIR"] = tempfile.mkdtemp(prefix="moe-tests-")
    atexit.register(shutil.rmtree, os.environ["MOE_TESTS_CACHE_DIR"], ignore_errors=True)
os.environ["MOE_CACHE_DIR"] = os.environ["MOE_TESTS_CACHE_DIR"]

torch.set_num_threads(1)  # tensors are tiny, and threads of several pytest processes wait for one another

MARKERS_OF_FIXTURE = {
    "triton_device": ("interpreter", "gpu"),
    "numba_device": ("simulator", "gpu"),
    "cuda": ("gpu",),
}


def pytest_configure(config: pytest.Config) -> None:
    from mode_progress import ModeProgress

    if mode := os.environ.get("MOE_TESTS_MODE"):
        config.pluginmanager.register(ModeProgress(mode, config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, markers in MARKERS_OF_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                for marker in markers:
                    item.add_marker(marker)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh allocations hold NaN, or an index far out of bounds: what is read before it is written shows."""

    from moe import testing

    with testing.poisoned_memory():
        yield


@pytest.fixture
def triton_device() -> torch.device:
    return _device_for(IS_INTERPRETED, "set TRITON_INTERPRET=1")


@pytest.fixture
def numba_device() -> torch.device:
    return _device_for(IS_SIMULATED, "set NUMBA_ENABLE_CUDASIM=1")


@pytest.fixture
def cuda() -> torch.device:
    return _device_for(False, "no emulation can stand in")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU with the references, and the GPU with the kernels."""
    return torch.device("cpu") if request.param == "cpu" else _device_for(False, "the CPU case runs")


def _device_for(is_emulated: bool, otherwise: str) -> torch.device:
    if is_emulated:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    pytest.skip(f"no GPU here; {otherwise}")
