"""The layer in CUDA graphs and on streams: replays follow their inputs, nothing waits for the GPU, dependent launches race with nothing."""

from __future__ import annotations

import pytest
import torch
from small_layer import SMALL, layer_on
from torch import Tensor

from moe import MoEConfig, MoEPipeline, build_pipeline
from moe.testing.problems import make_problem


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1000])
def test_captured_call_follows_changed_inputs(num_tokens: int, cuda: torch.device) -> None:
    _, call, problem = layer_on(cuda, num_tokens)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(3):
        fresh = make_problem(
            MoEConfig.create(**SMALL | {"num_experts": 32, "top_k": 4}), num_tokens, seed=seed, device=cuda
        )
        problem.logits.copy_(fresh.logits)
        problem.hidden_states.copy_(fresh.hidden_states)
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, call())


@pytest.mark.parametrize("predecessor", ["copy", "zeros", "another stream"])
@pytest.mark.parametrize("num_tokens", [7, 64, 5000])
def test_a_captured_layer_waits_for_what_is_no_kernel_before_it(
    num_tokens: int, predecessor: str, cuda: torch.device
) -> None:
    """Its first kernel is a dependent launch, which a graph knows of kernels only: not of copies, nor of several streams."""
    pipeline, call, problem = layer_on(cuda, num_tokens)
    generator = torch.Generator(device=cuda).manual_seed(0)
    sources = torch.randn(4, *problem.logits.shape, generator=generator, device=cuda)
    source, large = sources[0].clone(), torch.randn(2, 1 << 24, generator=generator, device=cuda)
    other_stream = torch.cuda.Stream()

    def write_logits() -> None:
        if predecessor == "another stream":
            other_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other_stream):
                large[0].mul_(1.0)
                torch.add(source, 0.0, out=problem.logits)
            torch.cuda.current_stream().wait_stream(other_stream)
        else:
            large[0].copy_(large[1])
            problem.logits.copy_(source) if predecessor == "copy" else problem.logits.zero_()

    write_logits()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_logits()
        captured = call()
    for new_source in sources:
        source.copy_(new_source)
        problem.logits.fill_(float("nan"))
        captured.fill_(float("nan"))
        graph.replay()
        logits = new_source if predecessor != "zeros" else torch.zeros_like(new_source)
        expected = pipeline(logits, problem.hidden_states, problem.w1, problem.w2)
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("num_tokens", [1, 64, 3000])
def test_twenty_runs_give_the_same_bits(num_tokens: int, cuda: torch.device) -> None:
    _, call, _ = layer_on(cuda, num_tokens)
    first = call()
    assert all(torch.equal(call(), first) for _ in range(20))


def test_calls_never_wait_for_the_gpu(cuda: torch.device) -> None:
    _, call, _ = layer_on(cuda, 100)
    expected = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("num_tokens", "num_local_experts"),
    # few tokens; portable, swapped, wide GEMMs; two launches that plan; a slice, with few tokens and more
    [(5, 16), (24, 16), (300, 16), (1000, 16), (5000, 16), (3, 8), (300, 8)],
)
def test_dependent_launches_of_a_whole_layer_race_with_nothing(
    num_tokens: int, num_local_experts: int, cuda: torch.device
) -> None:
    """A captured chain of dependent layers, replayed over random inputs beside a noisy stream, has the plain chain's bits.

    Layers write into one another's inputs and reuse freed memory, so a kernel that reads or writes too early meets what
    another one is still using.
    """
    num_replays, num_inputs, num_layers = 2_500, 16, 3
    dims = {"hidden_size": 512, "intermediate_size": 320, "num_experts": 16, "top_k": 4}  # W1: enough to prefetch
    config = MoEConfig.create(**dims, num_local_experts=num_local_experts)
    plain, dependent = build_pipeline(config, cuda, uses_pdl=False), build_pipeline(config, cuda)
    generator = torch.Generator(device=cuda).manual_seed(0)
    logits = torch.randn(num_inputs, num_layers, num_tokens, 16, generator=generator, device=cuda)
    hidden = torch.randn(num_inputs, num_tokens, 512, generator=generator, device=cuda).bfloat16()
    problem = make_problem(config, 1, device=cuda)
    w1, w2 = problem.w1, problem.w2 * 4  # so that activations do not vanish over the layers

    def run(pipeline: MoEPipeline, logits: Tensor, buffers: list[Tensor]) -> None:
        for layer in range(num_layers):
            pipeline(logits[layer], buffers[layer % 2], w1, w2, output=buffers[(layer + 1) % 2])

    buffers = [torch.empty_like(hidden[0]) for _ in range(2)]
    expected = []
    for its_logits, its_hidden in zip(logits, hidden):
        buffers[0].copy_(its_hidden)
        run(plain, its_logits, buffers)
        expected.append(buffers[num_layers % 2].clone())
    assert all(value.isfinite().all() for value in expected)
    # Of a slice, tokens that met no local expert in the last layer are zero.
    least = num_inputs if num_local_experts == 16 else num_inputs * 3 // 4
    assert sum(bool(value.any()) for value in expected) >= least

    static_logits = logits[0].clone()
    run(dependent, static_logits, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(dependent, static_logits, buffers)
    noise = torch.cuda.Stream()
    busy = [torch.randn(size, size, device=cuda) for size in (64, 512, 1024)]
    num_wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    order = torch.randint(num_inputs, (num_replays,), generator=torch.Generator().manual_seed(1)).tolist()
    for replay, index in enumerate(order):
        if replay % 8 == 0:
            with torch.cuda.stream(noise):
                torch.mm(busy[index % 3], busy[index % 3])
        static_logits.copy_(logits[index])
        buffers[1].fill_(float("nan"))
        buffers[0].copy_(hidden[index])
        graph.replay()
        num_wrong += (buffers[num_layers % 2] != expected[index]).any()
    assert num_wrong.item() == 0
