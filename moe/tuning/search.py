"""Which choice is fastest for a layer, a bucket of token counts at a time: the model's, unless another beats the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.permute.compile_ahead import CompilingAhead
from moe.pipeline import MoEPipeline, build_pipeline
from moe.tuning.buckets import bucket_of, buckets_up_to
from moe.tuning.candidates import Candidates, kernels_on, left_to_the_model
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import is_tuned, remember
from moe.tuning.measure import measure_us
from moe.tuning.problem import ERROR_LIMIT, Problem, make_problem, make_weights
from moe.tuning.table import LayerKey, TableEntry

Call = Callable[[], object]
Timer = Callable[[TuningChoice, Sequence[Call]], float]  # microseconds a call; the calls take turns
Report = Callable[[str], None]

MIN_GAIN = 0.02  # of the model's time; a second run of the same kernels may differ by half of that
TURNS = 5  # of the winner and the model's choice in the last comparison: power and clock drift, so neither is timed in one piece
BUDGET_S = 0.02  # a timing
COMPILE_THREADS = 8  # most of a compilation is in ptxas and LLVM, which hold no lock of Python's


def tune(
    config: MoEConfig,
    weights: tuple[Tensor, Tensor] | None = None,
    token_counts: Iterable[int] | None = None,
    *,
    device: torch.device | str = "cuda",
    max_num_tokens: int = 8192,
    seed: int = 0,
    timer: Timer | None = None,
    report: Report | None = None,
    force: bool = False,
) -> list[TableEntry]:
    """Find what is fastest for each bucket of token counts, and add it to the user's table, bucket by bucket.

    A choice is kept if its result is right, and it is faster than the model's by 2% or more in a paired comparison; else the
    entry says to leave the choice to the model. What `config` names explicitly has no part: it wins over every table.

    Args:
        weights: w1 and w2 in `config.gemm1.weight_shape` and `config.gemm2.weight_shape`, bf16, only read; None makes
            random ones.
        token_counts: the counts whose buckets are tuned; None: all buckets up to `max_num_tokens`.
        device: a CUDA device. Elsewhere there is nothing to choose, unless `timer` says what is faster.
        seed: of the random inputs (and weights).
        timer: microseconds of a choice's calls, one an input set; None: `measure_us`, replaying a CUDA graph.
        report: receives a line of text at each step.
        force: tune also buckets that the tables hold.

    Returns:
        The entries of the buckets that were tuned now; none for those that were before.

    Raises:
        ValueError: weights that do not fit the config, a device without CUDA, a token count beyond the last bucket.
    """
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type != "cuda" and timer is None:
        raise ValueError(f"device: expected a CUDA device, got {where}; the references have nothing to choose")
    config, report = left_to_the_model(config), report or _say_nothing
    buckets = buckets_up_to(max_num_tokens) if token_counts is None else _buckets_of(token_counts)
    wanted = [bucket for bucket in buckets if force or not is_tuned(config, bucket, where)]
    if len(wanted) < len(buckets):
        report(f"{len(buckets) - len(wanted)} of {len(buckets)} buckets are tuned already; force=True tunes them again")
    if not wanted:
        return []
    timer = timer or partial(_time, device=where)
    all_candidates = [Candidates(config, bucket, kernels_on(where)) for bucket in wanted]
    with torch.no_grad(), _planners_ahead(config, all_candidates, where) as planners:
        w1, w2 = make_weights(config, where, seed=seed) if weights is None else weights
        _expect_weights(config, w1, w2, where)
        gpu, entries = GpuModel.of(where), []
        for candidates in all_candidates:
            if candidates.runs_grouped:
                planners.wait()
            entry = _tune_bucket(candidates, w1, w2, seed=seed, timer=timer, report=report)
            if entry is not None:
                remember(gpu, [entry])
                entries.append(entry)
    if where.type == "cuda":
        torch.cuda.empty_cache()  # what the search allocated would else be missing to its caller
    return entries


@dataclass(frozen=True)
class _Search:
    """The search in one bucket."""

    config: MoEConfig
    w1: Tensor
    w2: Tensor
    problem: Problem
    timer: Timer
    report: Report

    def pipeline_of(self, choice: TuningChoice) -> MoEPipeline:
        return build_pipeline(choice.apply(self.config), self.w1.device)

    def calls(self, choice: TuningChoice) -> list[Call]:
        """One an input set. The layer from chosen experts on: routing has nothing to choose."""
        pipeline = self.pipeline_of(choice)
        return [partial(pipeline.run_experts, i.topk, i.hidden_states, self.w1, self.w2) for i in self.problem.sets]

    def fastest(self, best: TuningChoice, best_us: float, others: list[TuningChoice]) -> tuple[TuningChoice, float]:
        """The fastest of `best` and those of `others` that are right."""
        self.compile(others)
        for choice in others:
            time_us = self.time_us(choice)
            if time_us is not None and time_us < best_us:
                best, best_us = choice, time_us
        return best, best_us

    def time_us(self, choice: TuningChoice) -> float | None:
        """Microseconds a call; None for a choice that fails, or whose result is wrong, which is reported."""
        try:
            calls = self.calls(choice)
            error = self.problem.relative_error(calls[0]())  # type: ignore[arg-type]  # run_experts returns a tensor
            if not error <= ERROR_LIMIT:  # NaN too
                self.report(f"  dropped {describe(choice)}: wrong result, relative error {error:.1e}")
                return None
            return self.timer(choice, calls)
        except Exception as failure:  # whatever a compiler or a launch raises: others may be fine
            lines = str(failure).splitlines() or [""]
            self.report(f"  dropped {describe(choice)}: {type(failure).__name__}: {lines[0]}")
            return None

    def compile(self, choices: list[TuningChoice]) -> None:
        """Call each choice once, side by side: that compiles its kernels. What fails will fail again, and say so then."""
        device, is_inference = self.w1.device, torch.is_inference_mode_enabled()
        if device.type != "cuda":
            return

        def call_once(choice: TuningChoice) -> None:
            # A stream of its own: kernels that count their blocks in kept memory rely on the order of a stream.
            with (
                torch.inference_mode(is_inference),
                torch.no_grad(),
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.Stream(device)),
            ):
                self.calls(choice)[0]()

        torch.cuda.synchronize(device)
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            for done in [pool.submit(call_once, choice) for choice in choices]:
                done.exception()
        torch.cuda.synchronize(device)

    def paired_us(self, choice: TuningChoice) -> tuple[float, float]:
        """Microseconds of the choice and of the model's, timed in turns: medians over the turns."""
        pair = (choice, TuningChoice())
        calls = [self.calls(one) for one in pair]
        turns = [[self.timer(one, its_calls) for one, its_calls in zip(pair, calls)] for _ in range(TURNS)]
        ours, models = zip(*turns)
        return median(ours), median(models)


def _planners_ahead(config: MoEConfig, all_candidates: list[Candidates], device: torch.device) -> CompilingAhead:
    """The planner's kernels, compiled while the search begins."""
    if device.type != "cuda":
        return CompilingAhead([])
    from moe.tuning.ahead import planning_jobs

    return CompilingAhead(planning_jobs(config, all_candidates, device))


def _tune_bucket(
    candidates: Candidates, w1: Tensor, w2: Tensor, *, seed: int, timer: Timer, report: Report
) -> TableEntry | None:
    """The entry of a bucket, or None where the model's own choice does not run."""
    config, bucket = candidates.config, candidates.num_tokens
    report(f"{bucket:,} tokens")
    model = TuningChoice()
    try:
        problem = make_problem(config, bucket, w1, w2, seed=seed)
    except torch.OutOfMemoryError as failure:
        report(f"  left out: {str(failure).splitlines()[0]}")
        return None
    search = _Search(config, w1, w2, problem, timer, report)
    model_us = search.time_us(model)
    if model_us is None:
        report("  left out: the model's own choice does not run here")
        return None
    best, best_us = search.fastest(model, model_us, candidates.compositions()[1:])
    for axis in candidates.variants(best):
        best, best_us = search.fastest(best, best_us, axis(best))
    tuned_us = model_us
    if best != model:
        tuned_us, model_us = search.paired_us(best)
        if tuned_us > (1 - MIN_GAIN) * model_us:
            report(
                f"  {describe(best)} came to {tuned_us:.1f} us, the model's choice to {model_us:.1f}: within {MIN_GAIN:.0%}"
            )
            best, tuned_us = model, model_us
    report(f"  {describe(best)}: {tuned_us:.1f} us, the model's choice {model_us:.1f} us")
    return TableEntry(key=LayerKey.of(config), bucket=bucket, choice=best, tuned_us=tuned_us, model_us=model_us)


def describe(choice: TuningChoice) -> str:
    """What a choice names, in a line."""
    named = choice.model_dump(exclude_none=True)
    if not named:
        return "the model's choice"
    return ", ".join(f"{name} {_short(value)}" for name, value in named.items())


def _short(value: object) -> str:
    return "x".join(str(number) for number in value.values()) if isinstance(value, dict) else str(value)


def _buckets_of(token_counts: Iterable[int]) -> tuple[int, ...]:
    buckets = []
    for num_tokens in token_counts:
        bucket = bucket_of(num_tokens)
        if num_tokens < 1 or bucket is None:
            raise ValueError(
                f"token_counts: expected counts from 1 to the last bucket's, got {num_tokens}; leave it out"
            )
        buckets.append(bucket)
    return tuple(sorted(set(buckets)))


def _expect_weights(config: MoEConfig, w1: Tensor, w2: Tensor, device: torch.device) -> None:
    config.gemm1.check_weights("gemm1_weights", w1, device)
    config.gemm2.check_weights("gemm2_weights", w2, device)


def _time(choice: TuningChoice, calls: Sequence[Call], *, device: torch.device) -> float:
    return measure_us(calls, device=device, budget_s=BUDGET_S).median_us


def _say_nothing(text: str) -> None:
    pass
