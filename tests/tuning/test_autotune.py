"""When layers are tuned by being called: within the context, once, and never during a capture."""

import importlib
import threading
import warnings

import pytest
import torch

from moe.config import MoEConfig
from moe.gemm.config import FLASHINFER
from moe.trtllm import trtllm_bf16_moe
from moe.tuning.autotune import active, autotune, tune_missing
from moe.tuning.buckets import buckets_up_to
from moe.tuning.problem import make_weights
from moe.tuning.tuned import tuned_pipeline

CONFIG = MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
MODULE = importlib.import_module("moe.tuning.autotune")  # its package has a function of that name
W1, W2 = make_weights(CONFIG, torch.device("cpu"))
CUDA = torch.device("cuda", 0)  # only named: the search is a fake


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Each search that was asked for: its config, weights, buckets, and whether autotune was on meanwhile."""
    asked: list[tuple] = []

    def tune(config, weights, token_counts, *, device, report):
        asked.append((config, weights, list(token_counts), active()))

    monkeypatch.setattr(MODULE, "tune", tune)
    monkeypatch.setattr(MODULE, "_DONE", set())
    monkeypatch.setattr(MODULE, "is_tuned", lambda config, bucket, device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def test_nothing_is_tuned_outside_the_context(searches: list[tuple]):
    tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert searches == []


def test_first_call_within_tunes_all_buckets_once(searches: list[tuple]):
    with autotune():
        for num_tokens in (8, 8, 1, 300):
            tune_missing(CONFIG, num_tokens, W1, W2, max_num_tokens=512, device=CUDA)
    assert [(config, buckets) for config, _, buckets, _ in searches] == [(CONFIG, list(buckets_up_to(512)))]
    assert searches[0][1][0] is W1
    assert searches[0][1][1] is W2


def test_larger_limit_tunes_the_buckets_that_it_adds(searches: list[tuple]):
    with autotune():
        tune_missing(CONFIG, 8, W1, W2, max_num_tokens=16, device=CUDA)
        tune_missing(CONFIG, 1000, W1, W2, max_num_tokens=16, device=CUDA)
        tune_missing(CONFIG, 8, W1, W2, max_num_tokens=32, device=CUDA)
    assert [buckets for _, _, buckets, _ in searches] == [list(buckets_up_to(16)), [24, 32]]


def test_search_itself_runs_with_autotune_off(searches: list[tuple]):
    with autotune():
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
        assert active()
    assert searches[0][3] is False


def test_contexts_nest_and_an_error_leaves_them():
    assert not active()
    with autotune():
        with autotune(tune_mode=False):
            assert not active()
        with pytest.raises(RuntimeError), autotune():
            raise RuntimeError
        assert active()
    assert not active()


def test_context_holds_for_its_own_thread_alone():
    seen = []
    with autotune():
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_capture_is_warned_of_and_tunes_nothing(searches: list[tuple], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with autotune(), pytest.warns(UserWarning, match="call the layer once before"):
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert searches == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with autotune():
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert len(searches) == 1


def test_capture_of_a_tuned_layer_needs_no_warning(searches: list[tuple], monkeypatch: pytest.MonkeyPatch):
    with autotune(), warnings.catch_warnings():
        warnings.simplefilter("error")
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert len(searches) == 1


def test_capture_of_a_layer_that_a_table_holds_needs_no_warning(searches: list[tuple], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "is_tuned", lambda config, bucket, device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with autotune(), warnings.catch_warnings():
        warnings.simplefilter("error")
        tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert searches == []


def test_buckets_that_a_table_holds_are_left_out(searches: list[tuple], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "is_tuned", lambda config, bucket, device: bucket != 16)
    with autotune():
        tune_missing(CONFIG, 8, W1, W2, max_num_tokens=64, device=CUDA)
    assert [buckets for _, _, buckets, _ in searches] == [[16]]


def test_search_that_fails_is_a_warning_and_is_not_tried_again(searches: list[tuple], monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fail(*arguments: object, **more: object) -> None:
        asked.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(MODULE, "tune", fail)
    with autotune():
        with pytest.warns(UserWarning, match="stopped by OutOfMemoryError: CUDA out of memory. Tried"):
            tune_missing(CONFIG, 8, W1, W2, device=CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tune_missing(CONFIG, 8, W1, W2, device=CUDA)
    assert len(asked) == 1


def test_search_says_that_it_begins_before_a_minute_passes(searches: list[tuple], caplog: pytest.LogCaptureFixture):
    with autotune():
        for _ in range(2):
            tune_missing(CONFIG, 8, W1, W2, max_num_tokens=2, device=CUDA)
    assert [record.getMessage() for record in caplog.records] == [
        "tuning a layer of 8 experts of 64 x 32 for 2 counts of tokens on cuda:0: about a minute, once"
    ]
    assert caplog.records[0].levelname == "WARNING"


def test_batch_invariant_layers_are_left_as_they_are(searches: list[tuple]):
    config = MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2, is_batch_invariant=True)
    with autotune():
        tune_missing(config, 8, W1, W2, device=CUDA)
    assert searches == []


def test_a_call_that_is_refused_tunes_nothing(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []
    monkeypatch.setattr("moe.tuning.tuned.tune_missing", lambda *args, **more: asked.append(args))
    pipeline = tuned_pipeline(CONFIG, "cpu")
    logits, hidden_states = torch.zeros(5, 8), torch.zeros(5, 64, dtype=torch.bfloat16)
    topk = pipeline.at(5).route(logits)
    with autotune():
        for call in (
            lambda: pipeline(logits, hidden_states[:4], W1, W2),
            lambda: pipeline(logits, hidden_states, W1, W2, output=hidden_states),
            lambda: pipeline.expert_outputs(logits[:, :7].contiguous(), hidden_states, W1, W2),
            lambda: pipeline.run_experts(topk, hidden_states.float(), W1, W2),
            lambda: pipeline.run_experts_unfinalized(topk, hidden_states, W2, W1),
        ):
            with pytest.raises(ValueError, match="expected"):
                call()
        assert asked == []
        pipeline.run_experts(topk, hidden_states, W1, W2)
    assert len(asked) == 1


def test_cpu_and_empty_batches_tune_nothing(searches: list[tuple]):
    with autotune():
        tune_missing(CONFIG, 8, W1, W2)
        tune_missing(CONFIG, 0, W1, W2, device=CUDA)
    assert searches == []


def test_flat_call_tunes_up_to_the_number_that_it_was_given(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int]] = []

    def tune_missing(config, num_tokens, w1, w2, *, max_num_tokens):
        asked.append((num_tokens, max_num_tokens))

    monkeypatch.setattr("moe.tuning.tuned.tune_missing", tune_missing)
    config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2, weight_format=FLASHINFER)
    w1, w2 = make_weights(config, torch.device("cpu"))
    hidden_states = torch.ones(5, 64, dtype=torch.bfloat16)

    def call() -> None:
        trtllm_bf16_moe(
            torch.zeros(5, 8), None, hidden_states, w1, w2, 8, 2, None, None, 64, 0, 8, tune_max_num_tokens=96
        )

    call()
    assert asked == []
    with autotune():
        call()
    assert asked == [(5, 96)]
