"""Routing under autograd: as operators of torch, or without them where nobody else looks on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from moe.traced import define, is_plain
from moe.training.experts import launch_of
from moe.training.known import pipeline_of


def route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] int32 and weights [T, K] bfloat16, whose gradient reaches the logits. They were checked."""
    run: Any = torch.ops.moe.training_route
    if is_plain((logits, bias)):
        run = _Route.apply if torch.is_grad_enabled() and logits.requires_grad else _run_route
    weights, ids = run(logits, bias, pipeline)
    return ids, weights


def _route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    """Weights first: torch's checks of an operator add its results up, in the dtype of the first."""
    pipeline_of(pipeline, logits.device).config.routing.check(
        logits, bias, None
    )  # which nothing did before in a compiled program
    return _run_route(logits, bias, pipeline)


def _run_route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    topk = pipeline_of(pipeline, logits.device).at(logits.shape[0]).ready.route(logits, bias)
    return topk.weights, topk.expert_ids


def _route_backward(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, pipeline: str) -> Tensor:
    """-> [T, E] in the logits' dtype."""
    stage = launch_of(pipeline_of(pipeline, logits.device).route_backward)
    return stage(grad_weights.float().contiguous(), logits, expert_ids)


def _fake_route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], pipeline_of(pipeline, logits.device).config.top_k)
    return logits.new_empty(shape, dtype=torch.bfloat16), logits.new_empty(shape, dtype=torch.int32)


def _fake_route_backward(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, pipeline: str) -> Tensor:
    return torch.empty_like(logits)


def _keep_for_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.pipeline = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_of_route(ctx: Any, grad_weights: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad_weights is None:
        return None, None, None
    logits, expert_ids = ctx.saved_tensors
    if not is_plain((grad_weights, logits, expert_ids)):
        return torch.ops.moe.training_route_backward(grad_weights, logits, expert_ids, ctx.pipeline), None, None
    with torch.no_grad():
        grad = _route_backward(grad_weights, logits, expert_ids, ctx.pipeline)
    if torch.is_grad_enabled():  # for a second derivative
        (grad,) = RefusingMore.apply(1, grad, grad_weights, logits)  # type: ignore[no-untyped-call]
    return grad, None, None


class _Route(torch.autograd.Function):
    """The operator without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _run_route(*inputs)
        _keep_for_route(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward_of_route)


def refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "second derivative: expected a first one, got the gradient of a gradient of the layer; it has none (create_graph=True)"
    )


class RefusingMore(torch.autograd.Function):
    """The first of its tensors, as they are, made of all of them: who differentiates them once more is refused."""

    @staticmethod
    def forward(ctx: Any, num_results: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:num_results]

    backward = staticmethod(refuse_second_derivative)


define("training_route", library.infer_schema(_route, mutates_args=()), _route, _fake_route)
define(
    "training_route_backward",
    library.infer_schema(_route_backward, mutates_args=()),
    _route_backward,
    _fake_route_backward,
)
library.register_autograd("moe::training_route", _backward_of_route, setup_context=_keep_for_route)
library.register_autograd("moe::training_route_backward", refuse_second_derivative)
