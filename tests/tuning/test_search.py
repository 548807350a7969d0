"""The search with a clock of its own: no kernel runs, the references do, and the test says what is fast."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from moe.cli.layer import FORMATS, layer_of_shape
from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.pipeline import MoEPipeline
from moe.runtime.cache_folder import cache_folder
from moe.shapes import NAMED_SHAPES
from moe.tuning import search
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import forget_tables, is_tuned, look_up
from moe.tuning.problem import make_problem, make_weights, num_sets_of
from moe.tuning.search import tune
from moe.tuning.table import load_table, merge_into, user_table_path

CONFIG = MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "tables"))
    forget_tables()
    yield
    forget_tables()


class Clock:
    """Says how long a choice takes, and keeps what it was asked."""

    def __init__(self, time_us=lambda choice: 100.0):
        self.time_us = time_us
        self.asked: list[TuningChoice] = []

    def __call__(self, choice, calls):
        self.asked.append(choice)
        for call in calls:
            call()
        return self.time_us(choice)


def tune_here(clock, token_counts=(64,), **more):
    return tune(CONFIG, token_counts=token_counts, device="cpu", timer=clock, **more)


def test_faster_choice_wins_and_its_times_are_kept():
    entries = tune_here(Clock(lambda choice: 80.0 if choice.finalize_block_h == 256 else 100.0))
    assert [entry.bucket for entry in entries] == [64]
    assert entries[0].choice.finalize_block_h == 256
    assert (entries[0].tuned_us, entries[0].model_us) == (80.0, 100.0)


def test_gains_on_several_axes_add_up():
    def time_us(choice: TuningChoice) -> float:
        return 100.0 - 10 * (choice.finalize_block_h == 256) - 10 * (choice.tile_rows == 16) - (choice.tile_rows == 64)

    choice = tune_here(Clock(time_us))[0].choice
    assert (choice.finalize_block_h, choice.tile_rows) == (256, 16)


@pytest.mark.parametrize(("time_us", "is_cached"), [(98.1, False), (97.9, True)])
def test_model_stays_within_two_percent(time_us: float, is_cached: bool):
    entry = tune_here(Clock(lambda choice: time_us if choice.finalize_block_h else 100.0))[0]
    assert (entry.choice != TuningChoice()) == is_cached
    assert entry.tuned_us == (time_us if is_cached else 100.0)


def test_lucky_timing_does_not_survive_the_paired_comparison():
    seen: set[TuningChoice] = set()

    def time_us(choice: TuningChoice) -> float:
        is_first = choice not in seen
        seen.add(choice)
        return 50.0 if is_first and choice.finalize_block_h else 100.0

    entry = tune_here(Clock(time_us))[0]
    assert entry.choice == TuningChoice()
    assert entry.model_us == 100.0


def test_winner_and_model_are_timed_in_turns_at_last():
    clock = Clock(lambda choice: 80.0 if choice.finalize_block_h == 256 else 100.0)
    winner = tune_here(clock)[0].choice
    assert clock.asked[-2 * search.TURNS :] == [winner, TuningChoice()] * search.TURNS


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_broken_choice_is_dropped_and_reported(fault: str, monkeypatch: pytest.MonkeyPatch):
    """The broken one would be the fastest."""

    def build(config: MoEConfig, device: torch.device) -> MoEPipeline:
        pipeline = build_pipeline(config, device)
        if config.finalize.block_h != 256:
            return pipeline

        def finalize(*args, **kwargs):
            if fault == "raises":
                raise RuntimeError("no such instruction\nand more lines")
            return pipeline.finalize(*args, **kwargs) * (1.05 if fault == "wrong" else float("nan"))

        return replace(pipeline, finalize=finalize)

    monkeypatch.setattr(search, "build_pipeline", build)
    lines: list[str] = []
    clock = Clock(lambda choice: {256: 10.0, 512: 80.0}.get(choice.finalize_block_h, 100.0))
    entry = tune_here(clock, report=lines.append)[0]
    assert entry.choice.finalize_block_h != 256
    assert all(choice.finalize_block_h != 256 for choice in clock.asked)
    words = {"wrong": "wrong result", "nan": "error nan", "raises": "RuntimeError: no such instruction"}[fault]
    assert any("finalize_block_h 256" in line and words in line for line in lines)
    assert not any("\n" in line for line in lines)


def test_bucket_whose_model_fails_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def build(config: MoEConfig, device: torch.device) -> MoEPipeline:
        raise RuntimeError("nothing runs")

    monkeypatch.setattr(search, "build_pipeline", build)
    lines: list[str] = []
    assert tune_here(Clock(), report=lines.append) == []
    assert any("left out" in line for line in lines)
    assert not is_tuned(CONFIG, 64, CPU)


def test_a_comparison_that_fails_leaves_the_bucket_to_the_model():
    seen: list[TuningChoice] = []

    def time_us(choice: TuningChoice) -> float:
        if choice.finalize_block_h != 256:
            return 100.0
        seen.append(choice)
        if len(seen) == 2:  # the paired comparison of the first bucket
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return 80.0

    lines: list[str] = []
    first, second = tune_here(Clock(time_us), [16, 64], report=lines.append)
    assert (first.choice, first.tuned_us, first.model_us) == (TuningChoice(), 100.0, 100.0)
    assert second.choice.finalize_block_h == 256
    assert any("OutOfMemoryError: CUDA out of memory." in line for line in lines)


@pytest.mark.parametrize("time_us", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_drops_the_choice(time_us: float):
    lines: list[str] = []
    clock = Clock(lambda choice: time_us if choice.finalize_block_h == 256 else 100.0)
    (entry,) = tune_here(clock, report=lines.append)
    assert entry.choice == TuningChoice()
    assert any("finalize_block_h 256" in line and f"it took {time_us} us" in line for line in lines)


def test_a_clock_that_fails_only_in_the_comparison_drops_the_choice():
    seen: set[TuningChoice] = set()

    def time_us(choice: TuningChoice) -> float:
        is_first = choice not in seen
        seen.add(choice)
        return 100.0 if choice.finalize_block_h != 256 else 50.0 if is_first else float("nan")

    assert tune_here(Clock(time_us))[0].choice == TuningChoice()


def test_a_search_waits_for_another_process_and_finds_what_that_found():
    (entry,) = tune_here(Clock(), [16])
    forget_tables()
    user_table_path(GpuModel.of(CPU)).unlink()
    clock, lines, results = Clock(), [], []
    with FileLock(cache_folder() / "cpu.search.lock"):
        thread = threading.Thread(target=lambda: results.extend(tune_here(clock, [16, 64], report=lines.append)))
        thread.start()
        while not lines:
            time.sleep(0.01)
        merge_into(user_table_path(GpuModel.of(CPU)), GpuModel.of(CPU), [entry])
    thread.join(60)
    assert lines[:2] == ["waiting for another process that tunes on cpu", "1 of 2 buckets are tuned already"]
    assert [one.bucket for one in results] == [64]


def test_searches_of_two_threads_take_turns():
    running, most = [], []

    def timer(choice, calls):
        running.append(choice)
        most.append(len(running))
        time.sleep(0.002)
        running.remove(choice)
        return 100.0

    threads = [threading.Thread(target=tune_here, args=(timer, [bucket])) for bucket in (16, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) == 1


def test_buckets_that_another_process_adds_meanwhile_are_skipped():
    clock = Clock()
    (other,) = tune_here(Clock(), [64])
    path, gpu = user_table_path(GpuModel.of(CPU)), GpuModel.of(CPU)
    path.unlink()
    forget_tables()

    def timer(choice, calls):
        merge_into(path, gpu, [other])
        return clock(choice, calls)

    assert [entry.bucket for entry in tune_here(timer, [16, 64, 96])] == [16, 96]


@pytest.mark.parametrize("force", [False, True], ids=["first time", "anew"])
def test_of_two_processes_that_tune_a_bucket_at_once_the_first_that_writes_counts(force: bool):
    path, gpu = user_table_path(GpuModel.of(CPU)), GpuModel.of(CPU)
    if force:
        tune_here(Clock(), [64])
    (other,) = tune_here(Clock(lambda choice: 50.0 if choice.finalize_block_h == 256 else 100.0), [16])
    other = other.model_copy(update={"bucket": 64})
    lines: list[str] = []

    def timer(choice, calls):
        merge_into(path, gpu, [other])  # while this process still searches
        return 50.0 if choice.finalize_block_h == 512 else 100.0

    (stands,) = tune_here(timer, [64], force=force, report=lines.append)
    assert stands == other
    assert look_up(CONFIG, 64, CPU) is None  # a CPU has nothing to choose
    assert look_up(CONFIG, 64, gpu) == other.choice
    assert [entry for entry in load_table(path, gpu).entries if entry.bucket == 64] == [other]
    assert any("another process was first: finalize_block_h 256 counts for all" in line for line in lines)


def test_a_search_without_a_folder_to_write_to_holds_in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path, recwarn: pytest.WarningsRecorder
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "file"))
    assert len(tune_here(Clock(), [16, 64])) == 2
    assert is_tuned(CONFIG, 16, CPU)
    assert is_tuned(CONFIG, 64, CPU)
    assert tune_here(Clock(), [16, 64]) == []


def test_tuned_bucket_is_skipped_until_forced():
    assert len(tune_here(Clock(), [16, 64])) == 2
    lines: list[str] = []
    clock = Clock()
    assert tune_here(clock, [16, 64], report=lines.append) == []
    assert clock.asked == []
    assert lines == ["2 of 2 buckets are tuned already"]
    assert [entry.bucket for entry in tune_here(clock, [64], force=True)] == [64]


def test_interrupted_run_keeps_the_buckets_that_it_did():
    clock = Clock()

    def interrupt_later(choice, calls):
        if calls[0].args[1].shape[0] == 64:
            raise KeyboardInterrupt
        return clock(choice, calls)

    with pytest.raises(KeyboardInterrupt):
        tune_here(interrupt_later, [8, 16, 64])
    forget_tables()
    assert [is_tuned(CONFIG, bucket, CPU) for bucket in (8, 16, 64)] == [True, True, False]


def test_token_counts_share_their_bucket():
    assert [entry.bucket for entry in tune_here(Clock(), [33, 40, 64, 48])] == [48, 64]


def test_buckets_go_up_to_the_largest_wanted():
    entries = tune_here(Clock(), None, max_num_tokens=16)
    assert entries[0].bucket == 1
    assert entries[-1].bucket == 16


def test_what_a_config_names_has_no_part_in_its_tuning():
    named = TuningChoice(tile_rows=128, finalize_block_h=64).apply(CONFIG)
    entry = tune(named, token_counts=[64], device="cpu", timer=Clock())[0]
    assert is_tuned(CONFIG, 64, CPU)
    assert entry.choice == TuningChoice()


def test_weights_of_the_caller_are_read_and_not_written():
    w1, w2 = make_weights(CONFIG, CPU, seed=3)
    w1.requires_grad_()
    kept = w1.clone(), w2.clone()
    versions = w1._version, w2._version
    passed = []

    def timer(choice, calls):
        passed.extend(call.args[2:] for call in calls)
        return Clock()(choice, calls)

    tune_here(timer, weights=(w1, w2))
    assert (w1._version, w2._version) == versions
    assert torch.equal(w1, kept[0])
    assert torch.equal(w2, kept[1])
    assert passed
    assert all(one is w1 and two is w2 for one, two in passed)


def test_tuning_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tune_here(Clock())
    assert torch.equal(torch.rand(3), expected)


HERE = {"device": "cpu", "timer": Clock()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "cpu"}, ValueError, "expected a CUDA device, got cpu"),
        (HERE | {"config": None}, TypeError, "config: expected a MoEConfig, got NoneType"),
        (HERE | {"token_counts": [0]}, ValueError, "token_counts: expected 1 or more, got 0"),
        (HERE | {"token_counts": [10**9]}, ValueError, "expected counts up to the last bucket's, 131072"),
        (HERE | {"token_counts": 64}, TypeError, "token_counts: expected several ints, got int"),
        (HERE | {"token_counts": [3.5]}, TypeError, "token_counts: expected an int, got float"),
        (HERE | {"token_counts": [True]}, TypeError, "token_counts: expected an int, got bool"),
        (HERE | {"token_counts": "64"}, TypeError, "token_counts: expected an int, got str"),
        (HERE | {"max_num_tokens": "8"}, TypeError, "max_num_tokens: expected an int, got str"),
        (HERE | {"max_num_tokens": 0}, ValueError, "max_num_tokens: expected 1 or more, got 0"),
        (HERE | {"weights": torch.zeros(1)}, TypeError, "weights: expected a tuple of w1 and w2, got Tensor"),
        (HERE | {"weights": (torch.zeros(1), torch.zeros(1))}, ValueError, "gemm1_weights"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_tuned_is_refused(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        tune(**{"config": CONFIG} | arguments)


def test_without_a_gpu_a_cuda_device_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a GPU that torch can use, got cuda and none"):
        tune(CONFIG)


def test_input_sets_of_few_tokens_avoid_each_others_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe.tuning.problem.sets_for", lambda num_tokens, device: 4)
    config = MoEConfig.create(hidden_size=32, intermediate_size=32, num_experts=64, top_k=4)
    problem = make_problem(config, 2, *make_weights(config, CPU))
    chosen = torch.cat([one.topk.expert_ids.flatten() for one in problem.sets])
    assert len(chosen.unique()) >= 4 * 4
    assert all(len(ids.unique()) == 4 for one in problem.sets for ids in one.topk.expert_ids)


@pytest.mark.parametrize(
    ("name", "sets_of_tokens"),
    [
        ("sonic-7b", {1: 16, 8: 5, 8192: 2}),
        ("qwen3-30b-a3b", {1: 8, 128: 2, 8192: 1}),
        ("mixtral-8x7b", {1: 2, 8: 2, 8192: 1}),
    ],
)
def test_input_sets_are_as_many_as_it_takes_to_leave_the_cache(name: str, sets_of_tokens: dict[int, int]):
    shape = NAMED_SHAPES[name]
    config = layer_of_shape(shape, FORMATS["hf"]).config
    found = {num_tokens: num_sets_of(config, num_tokens, torch.device("cuda")) for num_tokens in sets_of_tokens}
    assert found == sets_of_tokens


def test_error_is_of_the_tokens_that_were_checked():
    w1, w2 = make_weights(CONFIG, CPU)
    problem = make_problem(CONFIG, 200, w1, w2)
    right = build_pipeline(CONFIG, CPU).run_experts(problem.sets[0].topk, problem.sets[0].hidden_states, w1, w2)
    assert len(problem.checked_tokens) == 64
    assert problem.relative_error(right) < 1e-6
    assert problem.relative_error(right * 1.1) == pytest.approx(0.1, rel=0.05)


def test_what_was_found_is_looked_up_afterwards():
    entry = tune_here(Clock(lambda choice: 80.0 if choice.finalize_block_h == 256 else 100.0))[0]
    assert look_up(CONFIG, 60, GpuModel.of(CPU)) == entry.choice
