"""A fixture of pytest-benchmark for a stage of one's own. In a conftest.py:

    pytest_plugins = ["moe.testing.benchmark"]

and in a test, which `pytest --benchmark-json=stage.json` writes down with all that is in `StageTimes.report`:

    def test_time_of_my_gemm2(stage_benchmark):
        times = stage_benchmark("gemm2", my_gemm2, config=config, num_tokens=64, device="cuda")
        assert times.accuracy.is_good
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from moe.cli.own_stage import StageTimes
from moe.config import MoEConfig
from moe.testing.timing import measure_stage
from moe.tuning.measure import Peaks, measure_peaks

StageBenchmark = Callable[..., StageTimes]
TURNS = 4


@cache
def peaks_of(device: torch.device) -> Peaks:
    """Measured once a process."""
    return measure_peaks(device)


@pytest.fixture
def stage_benchmark(benchmark: Any) -> StageBenchmark:
    """`measure_stage`, with what it finds in `extra_info` of pytest-benchmark.

    pytest-benchmark's own columns time the whole measurement, once. `extra_info` has device_us and its quartiles, ours_us, dense_us,
    flops, num_bytes, tflops, gb_per_s, roof_us, share_of_roof, share_of_ours and share_of_dense (above 1: faster than that).
    """

    def run(
        stage: str,
        function: Callable[..., Any],
        *,
        config: MoEConfig,
        num_tokens: int,
        device: torch.device | str = "cuda",
        num_turns: int = TURNS,
        peaks: Peaks | None = None,
        **more: Any,
    ) -> StageTimes:
        where = torch.device(device)
        arguments = {"config": config, "num_tokens": num_tokens, "device": where, "num_turns": num_turns, **more}
        times = benchmark.pedantic(measure_stage, args=(stage, function), kwargs=arguments, rounds=1)
        benchmark.extra_info |= times.report(peaks or peaks_of(where))
        return times

    return run
