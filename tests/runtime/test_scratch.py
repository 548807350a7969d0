"""Scratch from a buffer: stages take all of theirs from it, one piece after another."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from moe import MoEConfig
from moe.permute.reference import plan_permutation_reference
from moe.routing.reference import select_experts_reference
from moe.runtime.scratch import new_scratch, scratch_from
from moe.testing.problems import make_problem
from moe.workspace import workspace_of

pytest.importorskip("triton")

from moe.fused.few_tokens.config import FewTokenConfig
from moe.fused.few_tokens.experts import launch_few_token_experts
from moe.gemm.portable.gemm1 import launch_portable_gemm1
from moe.gemm.portable.gemm2 import launch_portable_gemm2
from moe.permute.finalize import launch_finalize_tokens
from moe.permute.triton_plan import launch_plan_permutation

CONFIG = MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=4, top_k=2)


def lies_within(tensor: Tensor, memory: Tensor) -> bool:
    first = memory.data_ptr()
    return first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= first + memory.nbytes


def test_pieces_follow_one_another_and_start_at_multiples_of_512_bytes() -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    with scratch_from(memory):
        first = new_scratch(torch.zeros(1), (3, 5))
        second = new_scratch(first, (700,), torch.bfloat16)
        empty = new_scratch(first, (0, 4))
    assert (first.shape, first.dtype, second.dtype, empty.shape) == ((3, 5), torch.float32, torch.bfloat16, (0, 4))
    assert first.data_ptr() == memory.data_ptr()
    assert second.data_ptr() == memory.data_ptr() + 512
    assert not lies_within(new_scratch(first, (3,)), memory)


def test_a_thread_without_a_buffer_takes_none_of_anothers() -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    found: list[bool] = []
    with scratch_from(memory):
        thread = threading.Thread(target=lambda: found.append(lies_within(new_scratch(memory, (8,)), memory)))
        thread.start()
        thread.join()
        assert lies_within(new_scratch(memory, (8,)), memory)
    assert found == [False]


def test_a_buffer_that_is_too_small_is_our_fault() -> None:
    with (
        scratch_from(torch.zeros(512, dtype=torch.uint8)),
        pytest.raises(AssertionError, match="1024 bytes of a buffer"),
    ):
        new_scratch(torch.zeros(1), (200,))


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_kernels_take_their_scratch_from_a_buffer(num_tokens: int, triton_device: torch.device, monkeypatch) -> None:
    problem = make_problem(CONFIG, num_tokens, device=triton_device)
    topk = select_experts_reference(problem.logits, config=CONFIG.routing)
    few = FewTokenConfig.of_stages(CONFIG.permute, CONFIG.gemm1, CONFIG.gemm2)
    output = torch.empty_like(problem.hidden_states)
    gemms = {"gemm1": CONFIG.gemm1, "gemm2": CONFIG.gemm2}

    def chain() -> Tensor:
        permutation = launch_plan_permutation(topk, config=CONFIG.permute)
        activation = launch_portable_gemm1(problem.hidden_states, problem.w1, permutation, config=gemms["gemm1"])
        rows = launch_portable_gemm2(activation, problem.w2, permutation, config=gemms["gemm2"])
        return launch_finalize_tokens(rows, topk, permutation, config=CONFIG.finalize, output=output).clone()

    def fused() -> Tensor:
        arguments = (topk, problem.hidden_states, problem.w1, problem.w2)
        return launch_few_token_experts(*arguments, config=few, swiglu=None, output=output).clone()

    size = workspace_of(CONFIG, num_tokens).asked_bytes
    for run in (chain, fused):
        expected = run()
        memory = torch.full((size,), 0xFF, dtype=torch.uint8, device=triton_device)
        with scratch_from(memory):
            assert torch.equal(run(), expected)
        assert (memory != 0xFF).any()
    permutation = plan_permutation_reference(topk, config=CONFIG.permute)
    assert permutation.max_rows * (64 + 32) * 2 <= size
