"""The layer under autograd as operators of torch: torch's own checks of them, and compiled calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training.layers import NAMES, Leaves, leaves_of, logits_for, make_layer, trained

import moe
from moe.flow import SwigluParams, TopK
from moe.traced import is_plain
from moe.training.experts import GradBuffers

OPERATORS = torch.ops.moe


@pytest.fixture
def zeroed_memory() -> Iterator[None]:
    """Fresh allocations hold zeros: torch's checks compare results, padding rows too, which nobody writes."""
    with mock.patch.object(Tensor, "new_empty", Tensor.new_zeros):
        yield


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_experts_operator_is_what_torch_asks_of_one(device, zeroed_memory, recompute, keeps):
    case, training = make_layer(device, num_tokens=33, recompute=recompute)
    leaves = leaves_of(case, frozen=() if keeps else NAMES)
    weights = case.topk.weights.clone().requires_grad_(keeps)
    alpha = torch.full((5,), 1.702, device=device)
    inputs = (*leaves[1:2], case.topk.expert_ids, weights, *leaves[2:], alpha, None, None, None, None)
    torch.library.opcheck(OPERATORS.training_experts, (*inputs, training.key, keeps))


def test_the_route_operators_are_what_torch_asks_of_them(device):
    case, training = make_layer(device, num_tokens=33)
    logits = logits_for(case).requires_grad_()
    torch.library.opcheck(OPERATORS.training_route, (logits, None, training.key))
    grads, ids = torch.ones_like(case.topk.weights), case.topk.expert_ids
    torch.library.opcheck(OPERATORS.training_route_backward, (grads, logits.detach(), ids, training.key))


@pytest.mark.parametrize("has_buffers", [False, True])
def test_the_backward_operators_are_what_torch_asks_of_them(device, has_buffers):
    case, training = make_layer(device, num_tokens=33)
    tensors = [tensor.detach() for tensor in leaves_of(case)]
    inputs = (tensors[1], case.topk.expert_ids, case.topk.weights, *tensors[2:], None, None, None)
    kept = list(OPERATORS.training_experts(*inputs, None, None, training.key, True)[1:])
    wanted = [True] * 4 + [False] * 3
    if has_buffers:
        buffers = [torch.zeros(weights.shape, device=device) for weights in tensors[2:]]
        arguments = (case.grad_output, *inputs, kept, *buffers, training.key, wanted)
        torch.library.opcheck(OPERATORS.training_experts_backward_into, arguments)
    else:
        torch.library.opcheck(
            OPERATORS.training_experts_backward, (case.grad_output, *inputs, kept, training.key, wanted)
        )


class Watching(TorchDispatchMode):
    """The names of the operators of this package that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "moe":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_buffers", [False, True])
def test_a_mode_sees_operators_with_the_bits_of_a_call_that_nobody_watches(device, has_buffers):
    case, training = make_layer(device, num_tokens=33)
    results, names = [], []
    for is_watched in (False, True):
        buffers = GradBuffers(torch.ones(case.w1.shape, device=device), torch.ones(case.w2.shape, device=device))
        more = {"grad_buffers": buffers} if has_buffers else {}
        with Watching() if is_watched else nullcontext() as mode:
            output, leaves = trained(training, case, **more)
        results.append(
            [output, leaves.logits.grad, leaves.hidden_states.grad, leaves.w1.grad, leaves.w2.grad, *buffers]
        )
        names = mode.names if is_watched else names
    for one, other in zip(*results):
        assert (one is None and other is None) or torch.equal(one, other)
    into = "_into" if has_buffers else ""
    steps = ["training_route", "training_experts", f"training_experts_backward{into}", "training_route_backward"]
    assert names == steps


def test_a_watched_call_goes_back_unwatched(device):
    case, training = make_layer(device, num_tokens=33)
    _, plain = trained(training, case)
    leaves = leaves_of(case)
    with Watching():
        output = training(*leaves)
    output.backward(case.grad_output)
    assert all(torch.equal(leaves.grads[name], plain.grads[name]) for name in NAMES)


class Passing(TorchFunctionMode):
    """Lets every call through."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_a_default_device_is_no_onlooker_and_other_modes_are():
    tensors = (torch.zeros(1), None, torch.nn.Parameter(torch.zeros(1)))
    assert is_plain(tensors)
    with torch.device("cpu"):
        assert is_plain(tensors)
        with Passing():
            assert not is_plain(tensors)
    with Watching():
        assert not is_plain(tensors)
    assert not is_plain((torch.zeros(1, device="meta"),))
    seen: list[bool] = []
    torch.func.vmap(lambda row: seen.append(is_plain((row,))) or row)(torch.zeros(2, 2))
    assert seen == [False]


def test_adding_to_a_buffer_is_told_to_autograd(device):
    case, training = make_layer(device, num_tokens=33)
    buffers = GradBuffers(torch.zeros(case.w1.shape, device=device), torch.zeros(case.w2.shape, device=device))
    versions = [buffer._version for buffer in buffers]
    trained(training, case, grad_buffers=buffers)
    assert all(buffer._version > version for buffer, version in zip(buffers, versions))


def compiled_and_eager(function: Any, *, dynamic: bool | None, backend: str) -> tuple[Any, Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic), function


@pytest.mark.parametrize("dynamic", [False, None, True], ids=["static", "automatic", "dynamic"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_layer_is_one_graph_with_the_bits_of_an_eager_one(device, recompute, dynamic):
    case, training = make_layer(device, num_tokens=64, tile_rows=None, recompute=recompute)

    def layer(logits: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return training(logits * 2.0, hidden_states, w1, w2) + hidden_states

    compiled, eager = compiled_and_eager(layer, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (33, 20, 64):
        tensors = leaves_of(case)
        parts = [t[:num_tokens].detach().clone() if i < 2 else t.detach() for i, t in enumerate(tensors)]
        both = [Leaves(*(part.clone().requires_grad_() for part in parts)) for _ in range(2)]
        outputs = [call(*leaves) for call, leaves in zip((compiled, eager), both)]
        for output in outputs:
            output.backward(case.grad_output[:num_tokens])
        assert torch.equal(*outputs)
        for name in NAMES:
            assert torch.equal(both[0].grads[name], both[1].grads[name]), name


def test_a_layer_compiled_by_inductor_trains(device):
    case, training = make_layer(device, num_tokens=40)

    def loss(logits: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return (training(logits, hidden_states, w1, w2).float() * case.grad_output.float()).sum()

    compiled, eager = compiled_and_eager(loss, dynamic=False, backend="inductor")
    both = [leaves_of(case) for _ in range(2)]
    compiled(*both[0]).backward()
    eager(*both[1]).backward()
    for name in NAMES:
        assert torch.equal(both[0].grads[name], both[1].grads[name]), name


def test_compiled_without_gradients_nothing_is_kept(device):
    case, training = make_layer(device, num_tokens=40)
    leaves = leaves_of(case)
    compiled, eager = compiled_and_eager(lambda *tensors: training(*tensors), dynamic=False, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), eager(*leaves))


def test_a_compiled_call_from_chosen_experts_with_parameters(device):
    case, training = make_layer(device, num_tokens=40)

    def layer(weights: Tensor, x: Tensor, w1: Tensor, w2: Tensor, alpha: Tensor) -> Tensor:
        return training.run_experts(TopK(case.topk.expert_ids, weights), x, w1, w2, swiglu=SwigluParams(alpha=alpha))

    compiled, eager = compiled_and_eager(layer, dynamic=False, backend="aot_eager")
    grads = []
    for call in (compiled, eager):
        tensors = (case.topk.weights, case.hidden_states, case.w1, case.w2, torch.full((5,), 1.5, device=device))
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        call(*leaves).backward(case.grad_output)
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_a_compiled_call_records_the_choice(device):
    case, training = make_layer(device, num_tokens=40)
    replay = torch.full((40, 2), -5, dtype=torch.int16, device=device)
    compiled, _ = compiled_and_eager(
        lambda *tensors: training(*tensors, routing_replay_out=replay), dynamic=False, backend="aot_eager"
    )
    leaves = leaves_of(case)
    compiled(*leaves).backward(case.grad_output)
    assert torch.equal(replay.int(), training.forward.route(leaves.logits.detach()).expert_ids)
    assert leaves.logits.grad.any()


def test_a_compiled_step_adds_weight_gradients_to_buffers(device):
    case, training = make_layer(device, num_tokens=40)
    _, plain = trained(training, case)
    buffers = GradBuffers(torch.zeros(case.w1.shape, device=device), torch.zeros(case.w2.shape, device=device))
    compiled, _ = compiled_and_eager(
        lambda *tensors: training(*tensors, grad_buffers=buffers), dynamic=False, backend="aot_eager"
    )
    leaves = leaves_of(case)
    compiled(*leaves).backward(case.grad_output)
    assert torch.equal(buffers.w1.bfloat16(), plain.grads["w1"])
    assert torch.equal(buffers.w2.bfloat16(), plain.grads["w2"])
    assert torch.equal(leaves.hidden_states.grad, plain.grads["hidden_states"])


def test_a_key_builds_the_same_layer_in_another_process():
    import subprocess
    import sys

    case, training = make_layer("cpu")
    code = (
        "import sys, torch\n"
        "from moe.training.known import pipeline_of\n"
        "training = pipeline_of(sys.argv[1], torch.device('cpu'))\n"
        "print(training.key == sys.argv[1], training.config.model_dump_json())\n"
    )
    result = subprocess.run([sys.executable, "-c", code, training.key], capture_output=True, text=True, check=True)
    is_same, _, config = result.stdout.strip().partition(" ")
    assert is_same == "True"
    assert moe.MoEConfig.model_validate_json(config) == case.config
