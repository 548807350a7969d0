"""Device time of a call or of several by turns, and the two rates that bound it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median, quantiles

import torch

GRAPH_US = 2000.0  # a graph this long hides the few microseconds between two graphs
MAX_CALLS_IN_GRAPH = 512
MAX_SAMPLES = 25  # more keep a GPU busy until it lowers its clock: by 14 to 16% of the time within 50 ms, on an H200
MIN_SAMPLES = 5


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and quartiles over `num_samples` samples."""

    median_us: float
    first_quartile_us: float
    third_quartile_us: float
    num_samples: int


@dataclass(frozen=True)
class Peaks:
    """What this device reached just now: the ceilings that a kernel is held against."""

    matmul_flops: float  # operations a second of a large square matmul, 2 a multiply-add
    matmul_dtype: str
    copy_bytes_per_s: float  # of a large copy, bytes read plus bytes written

    def roof_us(self, flops: float, num_bytes: float) -> float:
        """Microseconds below which work of so many operations and bytes cannot come."""
        return 1e6 * max(flops / self.matmul_flops, num_bytes / self.copy_bytes_per_s)


def measure_us(
    calls: Callable[[], object] | Sequence[Callable[[], object]],
    *,
    device: torch.device | str,
    budget_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
    is_warm: bool = False,
) -> Timing:
    """Time a call, or several that take turns.

    CUDA: all calls are captured in one CUDA graph, as often as fills about two milliseconds, and the graph is
    replayed between events; host time is not in the result. Hand in one call an input set, the sets together larger than
    the L2 cache, or the cache is what is measured. A call must not synchronise with the host.
    Elsewhere: each sample is one round over the calls by `clock`.

    Args:
        calls: the work; each is called at least once before timing starts, which compiles what needs compiling.
        budget_s: seconds to spend on timing; at least 1 sample (CPU) or 5 (CUDA) are taken, at most 25.
        clock: seconds, for the CPU.
        is_warm: the calls were made before, so that a CPU need not make them once more in advance.
    """
    calls = [calls] if callable(calls) else list(calls)
    if not calls:
        raise ValueError("calls: expected at least one callable, got none; pass one an input set")
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return _measure_graph_us(calls, budget_s)
    return _measure_clock_us([] if is_warm else calls, calls, budget_s, clock)


def measure_in_turns(
    calls: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    *,
    device: torch.device | str,
    budget_s: float,
    num_turns: int,
    report: Callable[[int, int], None] | None = None,
    is_warm: bool = False,
    enough_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Timing]]:
    """A, B, A, B, ..: the timing of each in every turn, by name. Power and clock drift, and so all have their share of it.

    Args:
        calls: by name, what `measure_us` takes.
        budget_s: seconds a turn of each.
        report: is told how many of all timings are done, and how many there are, before each.
        is_warm: the calls were made before, so that a CPU need not make them once more in advance.
        enough_s: after so many seconds no other turn begins.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    begin = clock()
    for turn in range(num_turns):
        if turn and clock() - begin >= enough_s:
            break
        for number, (name, its_calls) in enumerate(calls.items()):
            if report is not None:
                report(turn * len(calls) + number, num_turns * len(calls))
            timings[name].append(measure_us(its_calls, device=device, budget_s=budget_s, is_warm=is_warm or turn > 0))
    return timings


def median_turn(turns: Sequence[Timing]) -> Timing:
    """Medians over the turns of what was timed in turns, and how many samples they had together.

    Turns of one sample each are the samples: their quartiles are those over the turns.
    """
    if all(turn.num_samples == 1 for turn in turns):
        return _summarise([turn.median_us for turn in turns])
    return Timing(
        median(turn.median_us for turn in turns),
        median(turn.first_quartile_us for turn in turns),
        median(turn.third_quartile_us for turn in turns),
        sum(turn.num_samples for turn in turns),
    )


def _measure_clock_us(
    first_calls: list[Callable[[], object]],
    calls: list[Callable[[], object]],
    budget_s: float,
    clock: Callable[[], float],
) -> Timing:
    for call in first_calls:
        call()
    samples: list[float] = []
    begin = clock()
    while not samples or (len(samples) < MAX_SAMPLES and clock() - begin < budget_s):
        start = clock()
        for call in calls:
            call()
        samples.append(1e6 * (clock() - start) / len(calls))
    return _summarise(samples)


def _measure_graph_us(calls: list[Callable[[], object]], budget_s: float) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return _measure_replays_us(calls, budget_s)


def _measure_replays_us(calls: list[Callable[[], object]], budget_s: float) -> Timing:
    """How often a graph holds the calls follows from one that holds them once; long calls need no other graph."""
    graph = _capture(calls, 1)
    replays_us = _replays_us(graph, 2)
    round_us = min(replays_us)
    rounds = min(max(1, int(GRAPH_US / round_us)), max(1, MAX_CALLS_IN_GRAPH // len(calls)))
    num_samples = min(max(MIN_SAMPLES, int(budget_s * 1e6 / (rounds * round_us))), MAX_SAMPLES)
    if rounds > 1:
        graph, replays_us = _capture(calls, rounds), []
    replays_us += _replays_us(graph, num_samples - len(replays_us))
    return _summarise([replay_us / (rounds * len(calls)) for replay_us in replays_us])


def _capture(calls: list[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replays_us(graph: torch.cuda.CUDAGraph, num_replays: int) -> list[float]:
    """Time of each replay. A first one is thrown away: while it runs, the host gets ahead, so no launch is waited for."""
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairwise(marks)]


def _summarise(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples))


def measure_peaks(device: torch.device | str) -> Peaks:
    """Time a large matmul and a large copy on `device`; random data, since zeros run faster than real data.

    CUDA: bf16, 8192 cubed, and 2 GiB copied. CPU: bf16 or fp32, whichever is faster, 1024 cubed, and 256 MiB copied.
    """
    is_cuda = torch.device(device).type == "cuda"
    size = 8192 if is_cuda else 1024
    rates = {}
    for dtype in (torch.bfloat16,) if is_cuda else (torch.bfloat16, torch.float32):
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        timing = measure_us(partial(torch.matmul, left, right), device=device)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / (timing.median_us * 1e-6)
    fastest = max(rates, key=lambda name: rates[name])
    source = torch.randn((1 << 29) if is_cuda else (1 << 26), device=device)
    target = torch.empty_like(source)
    copy = measure_us(partial(torch.neg, source, out=target), device=device)
    num_bytes = 2 * source.numel() * source.element_size()
    return Peaks(rates[fastest], fastest, num_bytes / (copy.median_us * 1e-6))
