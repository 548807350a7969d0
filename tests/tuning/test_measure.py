"""Timing: what is sampled, how samples are summarised, and that a GPU's time is about the GPU."""

import pytest
import torch

from moe.tuning import measure
from moe.tuning.measure import Peaks, Timing, measure_in_turns, measure_peaks, measure_us, median_turn


class FakeClock:
    """Seconds that pass only while a call says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def call_taking(self, *durations_s: float):
        """A call that takes each duration in turn, and the last from then on."""
        left = list(durations_s)

        def call() -> None:
            self.now_s += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_first_call_is_not_timed():
    clock = FakeClock()
    timing = measure_us(clock.call_taking(9.0, 0.001), device="cpu", budget_s=0.01, clock=clock)
    assert timing.median_us == pytest.approx(1000)
    assert timing.third_quartile_us == pytest.approx(1000)


def test_median_and_quartiles_are_of_the_samples():
    clock = FakeClock()
    call = clock.call_taking(0.0, 1e-6, 2e-6, 3e-6, 4e-6, 100.0)
    timing = measure_us(call, device="cpu", budget_s=50.0, clock=clock)
    assert (timing.first_quartile_us, timing.median_us, timing.third_quartile_us) == pytest.approx((2, 3, 4))
    assert timing.num_samples == 5


def test_one_sample_is_taken_however_long_a_call_takes():
    clock = FakeClock()
    timing = measure_us(clock.call_taking(7.0), device="cpu", budget_s=0.1, clock=clock)
    assert timing == Timing(7e6, 7e6, 7e6, 1)


def test_what_is_timed_in_turns_takes_them_one_after_another():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    timings = measure_in_turns(calls, device="cpu", budget_s=0.0, num_turns=3)
    assert {name: len(turns) for name, turns in timings.items()} == {"a": 3, "b": 3}
    assert order == ["a", "a", "b", "b", *"abab"]  # each is called once before it is timed first


def test_turns_end_once_there_were_enough_seconds_and_warm_calls_are_not_made_in_advance():
    clock = FakeClock()
    calls = {"slow": clock.call_taking(6.0), "fast": clock.call_taking(1.0)}
    limits = {"budget_s": 0.0, "num_turns": 5, "clock": clock}
    timings = measure_in_turns(calls, device="cpu", enough_s=10.0, is_warm=True, **limits)
    assert {name: len(turns) for name, turns in timings.items()} == {"slow": 2, "fast": 2}
    assert clock.now_s == pytest.approx(14.0)
    assert {len(turns) for turns in measure_in_turns(calls, device="cpu", **limits).values()} == {5}


@pytest.mark.parametrize(
    ("call_us", "captured_rounds", "num_samples"),
    [(10.0, [1, 100], 20), (2500.0, [1], 8), (90_000.0, [1], 5)],
    ids=["short", "long", "longer_than_the_budget"],
)
def test_a_graph_is_filled_with_short_calls_and_a_long_call_is_captured_once(
    call_us: float, captured_rounds: list[int], num_samples: int, monkeypatch: pytest.MonkeyPatch
):
    captured = []
    monkeypatch.setattr(measure, "_capture", lambda calls, rounds: captured.append(rounds) or len(calls) * rounds)
    monkeypatch.setattr(measure, "_replays_us", lambda num_calls, num_replays: [num_calls * call_us] * num_replays)
    timing = measure._measure_replays_us([lambda: None, lambda: None], budget_s=0.04)
    assert captured == captured_rounds
    assert timing == Timing(call_us, call_us, call_us, num_samples)


def test_the_median_turn_has_medians_and_all_samples():
    turns = [Timing(10.0, 8.0, 12.0, 5), Timing(30.0, 7.0, 99.0, 6), Timing(20.0, 9.0, 13.0, 7)]
    assert median_turn(turns) == Timing(20.0, 8.0, 13.0, 18)


def test_calls_take_turns_and_share_the_time():
    clock = FakeClock()
    order = []

    def call_named(name: str, duration_s: float):
        def call() -> None:
            order.append(name)
            clock.now_s += duration_s

        return call

    timing = measure_us([call_named("a", 1.0), call_named("b", 3.0)], device="cpu", budget_s=1.0, clock=clock)
    assert order == ["a", "b", "a", "b"]
    assert timing.median_us == pytest.approx(2e6)


def test_no_calls_are_refused():
    with pytest.raises(ValueError, match="at least one callable, got none"):
        measure_us([], device="cpu")


def test_roof_is_the_slower_of_arithmetic_and_memory():
    peaks = Peaks(matmul_flops=1e12, matmul_dtype="bfloat16", copy_bytes_per_s=1e9)
    assert peaks.roof_us(2e6, 1e3) == pytest.approx(2.0)
    assert peaks.roof_us(2e6, 5e3) == pytest.approx(5.0)


def test_peaks_of_this_cpu_are_plausible():
    peaks = measure_peaks("cpu")
    assert 1e8 < peaks.matmul_flops < 1e15
    assert 1e7 < peaks.copy_bytes_per_s < 1e13
    assert peaks.matmul_dtype in ("bfloat16", "float32")


def test_host_time_is_not_in_gpu_time(cuda: torch.device):
    values = torch.zeros(1, device=cuda)

    def slow_to_launch() -> None:
        sum(range(100_000))  # about a millisecond of host time
        values.add_(1)

    assert measure_us(slow_to_launch, device=cuda).median_us < 50
