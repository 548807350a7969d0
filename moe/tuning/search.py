"""Which choice is fastest for a layer, a bucket of token counts at a time: the model's, unless another beats the noise."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from filelock import Timeout
from torch import Tensor

from moe.checks import expect_count
from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.gemm.checks import check_weights
from moe.permute.compile_ahead import CompilingAhead
from moe.pipeline import MoEPipeline
from moe.runtime.cache_folder import cache_folder, can_write, file_lock
from moe.runtime.device import expect_kernels
from moe.tuning.buckets import BUCKETS, bucket_of, buckets_up_to
from moe.tuning.candidates import Candidates, kernels_on, left_to_the_model
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import TABLES, is_tuned, remember, users_entries
from moe.tuning.measure import measure_us
from moe.tuning.problem import ERROR_LIMIT, Problem, make_problem, make_weights
from moe.tuning.table import LayerKey, TableEntry

Call = Callable[[], object]
Timer = Callable[[TuningChoice, Sequence[Call]], float]  # microseconds a call; the calls take turns
Report = Callable[[str], None]

MIN_GAIN = 0.02  # of the model's time; a second run of the same kernels may differ by half of that
TURNS = 5  # of the winner and the model's choice in the last comparison: power and clock drift, so neither is timed in one piece
BUDGET_S = 0.02  # a timing
_SEARCHING = threading.RLock()
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
        The entries of the buckets that were tuned now; none for those that were before. Where another process that tuned
        the same at the same time, on another GPU, wrote its entry first, that one: all processes take one choice.

    Raises:
        TypeError: a config that is none, a number that is no int.
        ValueError: weights that do not fit the config, a device without CUDA, a token count beyond the last bucket.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a MoEConfig, got {type(config).__name__}; MoEConfig.create makes one")
    where = _device_of(device, is_timed_elsewhere=timer is not None)
    config, report = left_to_the_model(config), report or _say_nothing
    buckets = buckets_of(token_counts, max_num_tokens)
    if weights is not None:
        _expect_weights(config, weights, where)
    gpu = GpuModel.of(where)
    wanted = _untuned(config, buckets, gpu, report, force=force)
    if not wanted:
        return []
    with _only_search_on(where, report):
        # Whoever searched until now may have searched for the same.
        TABLES.refresh(gpu)
        if not (wanted := _untuned(config, wanted, gpu, report, force=force)):
            return []
        timer = timer or partial(_time, device=where)
        return _tune_buckets(config, weights, wanted, where, seed=seed, timer=timer, report=report, force=force)


def buckets_of(token_counts: Iterable[int] | None, max_num_tokens: int) -> tuple[int, ...]:
    """The buckets of token counts, or all that hold counts up to `max_num_tokens`.

    Raises:
        TypeError: a number that is no int, or a single one in the place of several.
        ValueError: one below 1, or beyond the last bucket.
    """
    expect_count("max_num_tokens", max_num_tokens)
    if token_counts is None:
        return buckets_up_to(max_num_tokens)
    if not isinstance(token_counts, Iterable):
        raise TypeError(f"token_counts: expected several ints, got {type(token_counts).__name__}; pass a list")
    buckets = set()
    for num_tokens in token_counts:
        expect_count("token_counts", num_tokens)
        bucket = bucket_of(num_tokens)
        if bucket is None:
            raise ValueError(
                f"token_counts: expected counts up to the last bucket's, {BUCKETS[-1]}, got {num_tokens}; leave it out"
            )
        buckets.add(bucket)
    return tuple(sorted(buckets))


def _device_of(device: torch.device | str, *, is_timed_elsewhere: bool) -> torch.device:
    where = torch.device(device)
    if where.type != "cuda":
        if not is_timed_elsewhere:
            raise ValueError(f"device: expected a CUDA device, got {where}; the references have nothing to choose")
    elif not torch.cuda.is_available():
        raise ValueError(f"device: expected a GPU that torch can use, got {where} and none; see `python -m moe info`")
    elif where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type == "cuda":
        expect_kernels(where)
    return where


def _untuned(config: MoEConfig, buckets: Sequence[int], gpu: GpuModel, report: Report, *, force: bool) -> Sequence[int]:
    untuned = [bucket for bucket in buckets if force or not is_tuned(config, bucket, gpu)]
    if len(untuned) < len(buckets):
        report(f"{len(buckets) - len(untuned)} of {len(buckets)} buckets are tuned already")
    return untuned


@contextmanager
def _only_search_on(device: torch.device, report: Report) -> Iterator[None]:
    """One search at a time on a GPU, in this process and others: two would time one another."""
    with _SEARCHING, ExitStack() as stack:
        if can_write(folder := cache_folder()):
            lock = file_lock(folder / f"{_name_of(device)}.search.lock")
            try:
                lock.acquire(timeout=0)
                stack.callback(lock.release)
            except Timeout:
                report(f"waiting for another process that tunes on {device}")
                lock.acquire()
                stack.callback(lock.release)
            except (OSError, NotImplementedError) as error:  # the latter from file systems without locks
                report(
                    f"{lock.lock_file} cannot be locked ({error}): a second search on {device} would disturb this one"
                )
        else:
            report(f"{folder} cannot be written: a second search on {device} would disturb this one")
        yield


def _name_of(device: torch.device) -> str:
    """The same in all processes, whatever they may see of the machine."""
    if device.type != "cuda":
        return device.type
    return f"gpu-{getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"


def _tune_buckets(
    config: MoEConfig,
    weights: tuple[Tensor, Tensor] | None,
    buckets: Sequence[int],
    where: torch.device,
    *,
    seed: int,
    timer: Timer,
    report: Report,
    force: bool,
) -> list[TableEntry]:
    all_candidates = [Candidates(config, bucket, kernels_on(where)) for bucket in buckets]
    gpu, entries = GpuModel.of(where), []
    with torch.no_grad(), _planners_ahead(config, all_candidates, where) as planners:
        w1, w2 = make_weights(config, where, seed=seed) if weights is None else weights
        for number, candidates in enumerate(all_candidates, 1):
            TABLES.refresh(gpu)  # processes on other GPUs of this model add to them too
            if not force and is_tuned(config, candidates.num_tokens, gpu):
                continue
            if candidates.runs_grouped:
                planners.wait()
            report(f"{candidates.num_tokens:,} tokens, bucket {number} of {len(all_candidates)}")
            seen = users_entries(gpu)
            entry = _tune_bucket(candidates, w1, w2, seed=seed, timer=timer, report=report)
            if entry is not None:
                (stands,) = remember(gpu, [entry], seen=seen)
                if stands != entry:
                    report(f"  another process was first: {describe(stands.choice)} counts for all")
                entries.append(stands)
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
            time_us = self.timer(choice, calls)
            if not 0 < time_us < math.inf:
                self.report(f"  dropped {describe(choice)}: it took {time_us} us")
                return None
            return time_us
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

    def final_us(self, choice: TuningChoice) -> tuple[float, float] | None:
        """`paired_us`, or None where that fails, which is reported."""
        try:
            times_us = self.paired_us(choice)
        except Exception as failure:  # memory that was there a moment ago, say
            lines = str(failure).splitlines() or [""]
            self.report(f"  dropped {describe(choice)}: {type(failure).__name__}: {lines[0]}")
            return None
        return times_us if all(0 < time_us < math.inf for time_us in times_us) else None


def _planners_ahead(config: MoEConfig, all_candidates: list[Candidates], device: torch.device) -> CompilingAhead:
    """The planner's kernels, compiled while the search begins."""
    if device.type != "cuda":
        return CompilingAhead()
    try:
        from moe.tuning.ahead import planning_jobs

        return CompilingAhead(planning_jobs(config, all_candidates, device))
    except ImportError:  # which each choice will run into, and say so
        return CompilingAhead()


def _tune_bucket(
    candidates: Candidates, w1: Tensor, w2: Tensor, *, seed: int, timer: Timer, report: Report
) -> TableEntry | None:
    """The entry of a bucket, or None where the model's own choice does not run."""
    config, bucket = candidates.config, candidates.num_tokens
    model = TuningChoice()
    try:
        problem = make_problem(config, bucket, w1, w2, seed=seed)
    except RuntimeError as failure:  # out of memory, torch's or cuBLAS's
        report(f"  left out: {str(failure).splitlines()[0]}")
        return None
    search = _Search(config, w1, w2, problem, timer, report)
    model_us = search.time_us(model)
    if model_us is None:
        report("  left out: the model's own choice does not run here")
        return None
    compositions = candidates.compositions()[1:]
    search.compile(compositions)
    best, best_us = search.fastest(model, model_us, compositions)
    axes = candidates.variants(best)
    # Of all axes at once: what one finds changes which kernels are run together, hardly ever the kernels of the next.
    search.compile([choice for axis in axes for choice in axis(best)])
    for axis in axes:
        best, best_us = search.fastest(best, best_us, axis(best))
    tuned_us = model_us
    final_us = search.final_us(best) if best != model else None
    if final_us is None:
        best = model
    else:
        tuned_us, model_us = final_us
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


def _expect_weights(config: MoEConfig, weights: tuple[Tensor, Tensor], device: torch.device) -> None:
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"weights: expected a tuple of w1 and w2, got {type(weights).__name__}; pass (w1, w2)")
    for name, tensor, gemm in zip(("gemm1_weights", "gemm2_weights"), weights, (config.gemm1, config.gemm2)):
        check_weights(gemm, name, tensor, device)


def _time(choice: TuningChoice, calls: Sequence[Call], *, device: torch.device) -> float:
    return measure_us(calls, device=device, budget_s=BUDGET_S).median_us


def _say_nothing(text: str) -> None:
    pass
