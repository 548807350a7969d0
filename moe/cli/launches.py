"""python -m moe launches: every kernel launch of a layer's call, and its time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from moe.cli.layer import Layer, make_inputs
from moe.cli.text import decimal, table
from moe.compose import build_pipeline
from moe.tuning.measure import measure_us
from moe.tuning.problem import sets_for

NUM_CALLS = 24  # profiled, over input sets that take turns


@dataclass(frozen=True)
class Launch:
    """One of a call's launches: the kernel's name, and microseconds from its start to its end, the median over calls."""

    kernel: str
    median_us: float


@dataclass(frozen=True)
class LaunchReport:
    """The launches of a call from logits to output, and what the call takes in a CUDA graph."""

    num_tokens: int
    launches: list[Launch]
    graph_us: float  # each launch after the one before
    dependent_graph_us: float  # with dependent launches


def measure_launches(layer: Layer, num_tokens: int, *, routing: str, seed: int) -> LaunchReport:
    """Profile calls of the whole layer without dependent launches, whose times would contain their waits."""
    sets = make_inputs(layer, num_tokens, sets_for(num_tokens, layer.device), routing=routing, seed=seed)
    plain = build_pipeline(layer.config, layer.device, uses_pdl=False)
    calls_of = [
        [partial(pipeline, i.logits, i.hidden_states, layer.w1, layer.w2, bias=layer.bias) for i in sets]
        for pipeline in (plain, layer.pipeline)
    ]
    graph_us, dependent_us = (measure_us(calls, device=layer.device).median_us for calls in calls_of)
    return LaunchReport(num_tokens, launches_of_calls(_profile(calls_of[0])), graph_us, dependent_us)


def _profile(calls: Sequence[Callable[[], object]]) -> list[list[tuple[str, float]]]:
    """Name and microseconds of each kernel, a list a call."""
    from torch.profiler import ProfilerActivity, profile

    kernels_of_call = []
    for index in range(NUM_CALLS):
        call = calls[index % len(calls)]
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        events.sort(key=lambda event: event.time_range.start)
        kernels_of_call.append([(event.name, event.device_time_total) for event in events])
    return kernels_of_call


def launches_of_calls(kernels_of_call: Sequence[Sequence[tuple[str, float]]]) -> list[Launch]:
    """The launches that all calls have in common, in order; the first call is left out, since it may load kernels.

    Raises:
        ValueError: calls that launch different kernels.
    """
    names = [[short_name(name) for name, _ in kernels] for kernels in kernels_of_call]
    if any(of_call != names[-1] for of_call in names[1:]):
        raise ValueError(f"calls: expected the same launches in each, got {names[-1]} and others; profile one layer")
    times = zip(*([us for _, us in kernels] for kernels in kernels_of_call[1:]))
    return [Launch(name, median(of_launch)) for name, of_launch in zip(names[-1], times)]


def short_name(kernel: str) -> str:
    """A kernel's name without module, version and arguments: numba's are mangled, or "moe::plan_kernel[abi:v24,..](..)"."""
    mangled = re.search(r"\d([a-z][a-z_]*_kernel)", kernel)
    if mangled and not kernel.startswith(mangled[1]):
        return mangled[1]
    return re.split(r"[\[(<]", kernel)[0].split("::")[-1]


def launches_text(name: str, report: LaunchReport) -> str:
    """A line a launch, their sum, and the call in a graph."""
    rows = [(str(number), decimal(launch.median_us), launch.kernel) for number, launch in enumerate(report.launches, 1)]
    rows.append(("sum", decimal(sum(launch.median_us for launch in report.launches)), ""))
    rows.append(("graph", decimal(report.graph_us), "the call in a CUDA graph"))
    rows.append(("dependent", decimal(report.dependent_graph_us), "the same with dependent launches"))
    return f"{name}, {report.num_tokens:,} tokens\n" + table(("launch", "us", "kernel"), rows)
