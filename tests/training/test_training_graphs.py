"""A training step in a CUDA graph: captured as it is written, or by `torch.cuda.make_graphed_callables`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from training.layers import NAMES, Leaves, leaves_of, make_layer

import moe
from moe.flow import SwigluParams

TOKENS = 64


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """After three steps on a stream of their own, which compile what is not compiled yet."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def other_inputs(leaves: Leaves, seed: int) -> Leaves:
    """Other logits, which send tokens elsewhere, and other tokens, for the same weights."""
    generator = torch.Generator(device=leaves.logits.device).manual_seed(seed)
    logits, tokens = (
        torch.randn(tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype) for tensor in leaves[:2]
    )
    return Leaves(*(tensor.detach().clone().requires_grad_() for tensor in (logits, tokens, *leaves[2:])))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_captured_step_has_the_bits_of_eager_ones_whatever_is_copied_into_its_inputs(cuda, recompute):
    case, training = make_layer(cuda, num_tokens=TOKENS, recompute=recompute)
    static, grad_output = leaves_of(case), case.grad_output.clone()
    results: dict[str, Tensor] = {}

    def step() -> None:
        output = training(*static)
        results["output"] = output
        results.update(zip(NAMES, torch.autograd.grad(output, static, grad_output)))

    graph = captured(step)
    for seed in (5, 6):
        eager = other_inputs(static, seed)
        with torch.no_grad():
            for mine, other in zip(static, eager):
                mine.copy_(other)
            grad_output.copy_(case.grad_output * seed)
        graph.replay()
        output = training(*eager)
        output.backward(grad_output)
        assert torch.equal(results["output"], output)
        for name in NAMES:
            assert torch.equal(results[name], eager.grads[name]), name


def test_a_captured_step_adds_to_buffers_at_each_replay(cuda):
    case, training = make_layer(cuda, num_tokens=TOKENS)
    static = leaves_of(case)
    buffers = moe.GradBuffers(torch.zeros(case.w1.shape, device=cuda), torch.zeros(case.w2.shape, device=cuda))

    def step() -> None:
        training(*static, grad_buffers=buffers).backward(case.grad_output)
        for leaf in static:
            leaf.grad = None

    graph = captured(step)
    for buffer in buffers:
        buffer.zero_()
    for _ in range(2):
        graph.replay()
    eager = leaves_of(case)
    expected = moe.GradBuffers(*(torch.zeros_like(buffer) for buffer in buffers))
    for _ in range(2):
        training(*eager, grad_buffers=expected).backward(case.grad_output)
    assert expected.w1.any()
    assert torch.equal(buffers.w1, expected.w1)
    assert torch.equal(buffers.w2, expected.w2)


class Experts(torch.nn.Module):
    """A layer that owns its weights."""

    def __init__(self, training: moe.TrainingPipeline, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.training_pipeline = training
        self.w1, self.w2 = torch.nn.Parameter(w1.clone()), torch.nn.Parameter(w2.clone())

    def forward(self, logits: Tensor, hidden_states: Tensor) -> Tensor:
        return self.training_pipeline(logits, hidden_states, self.w1, self.w2)


def test_a_module_graphed_by_torch_has_the_bits_of_an_eager_one(cuda):
    case, training = make_layer(cuda, num_tokens=TOKENS)
    sample = leaves_of(case)
    graphed, eager = (Experts(training, case.w1, case.w2) for _ in range(2))
    graphed = torch.cuda.make_graphed_callables(graphed, tuple(sample[:2]))
    for seed in (5, 6):
        results = []
        for layer in (graphed, eager):
            inputs = other_inputs(sample, seed)
            layer.zero_grad()
            output = layer(inputs.logits, inputs.hidden_states)
            output.backward(case.grad_output)
            tensors = (output, inputs.logits.grad, inputs.hidden_states.grad, layer.w1.grad, layer.w2.grad)
            results.append([tensor.clone() for tensor in tensors])
        assert all(torch.equal(one, other) for one, other in zip(*results))


def test_swiglus_parameters_get_no_gradient_in_a_graph(cuda):
    case, training = make_layer(cuda, num_tokens=TOKENS)
    leaves, alpha = leaves_of(case), torch.full((5,), 1.5, device=cuda, requires_grad=True)

    def step() -> None:
        training(*leaves, swiglu=SwigluParams(alpha=alpha)).backward(case.grad_output)

    with pytest.raises(ValueError, match="swiglu: expected parameters that want no gradient while a CUDA graph"):
        captured(step)
