"""Waiting for a GPU whose collectives wait for a rank that never comes."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from moe.parallel import transport as transport_module
from moe.parallel.transport import _Collectives, to_host, transport_of

TIMEOUT_S = 0.3


def group_of_two(timeout_s: float):
    options = SimpleNamespace(_timeout=timedelta(seconds=timeout_s))
    return SimpleNamespace(rank=lambda: 0, size=lambda: 2, _get_backend=lambda device: SimpleNamespace(options=options))


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    monkeypatch.setattr(transport_module, "_silent_ranks", lambda group: "dead or late: rank 1")


def stream_whose_work_is(answers):
    event = SimpleNamespace(query=lambda: next(answers))
    return lambda device: SimpleNamespace(record_event=lambda: event)


def test_a_wait_ends_with_the_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", stream_whose_work_is(iter([False, False, True])))
    assert _Collectives(group_of_two(TIMEOUT_S)).wait("counts", torch.device("cuda", 0)) is None


def test_a_wait_for_a_rank_that_never_comes_ends_at_the_timeout_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", stream_whose_work_is(iter(lambda: False, None)))
    wanted = r"wait for counts of rows: rank 0 of 2 gave up after 0\.\d s \(timeout of the group: 0\.3 s\)"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=wanted):
        _Collectives(group_of_two(TIMEOUT_S)).wait("counts of rows", torch.device("cuda", 0))
    assert TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + 10


def test_a_fault_of_the_gpu_is_named_with_the_ranks(monkeypatch):
    def fault():
        raise RuntimeError("CUDA error: unspecified launch failure")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", stream_whose_work_is(fault()))
    with pytest.raises(RuntimeError, match=r"the layer's result: rank 0 of 2 gave up .*unspecified launch failure"):
        _Collectives(group_of_two(TIMEOUT_S)).wait("the layer's result", torch.device("cuda", 0))


def test_numbers_come_to_the_host_as_they_are():
    assert to_host(transport_of(None), "numbers", torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]


@pytest.mark.gpu
def test_a_gpu_that_is_busy_for_longer_than_the_timeout(cuda, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
        transport = transport_of(group)
        assert to_host(transport, "ones", torch.ones(3, dtype=torch.int64, device=cuda)) == [1, 1, 1]
        torch.cuda._sleep(4_000_000_000)  # about two seconds
        with pytest.raises(RuntimeError, match="wait for busy: rank 0 of 1 gave up after 0"):
            transport.wait("busy", torch.device(cuda))
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
