"""Routing as an operator of torch with registered autograd: eager and compiled calls alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from moe.traced import define
from moe.training.experts import launch_of
from moe.training.known import pipeline_of


def route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] int32 and weights [T, K] bfloat16, whose gradient reaches the logits."""
    weights, ids = torch.ops.moe.training_route(logits, bias, pipeline)
    return ids, weights


def _route(logits: Tensor, bias: Tensor | None, pipeline: str) -> tuple[Tensor, Tensor]:
    """Weights first: torch's checks of an operator add its results up, in the dtype of the first."""
    training = pipeline_of(pipeline, logits.device)
    training.config.routing.check(logits, bias, None)  # which nothing did before in a compiled program
    topk = training.at(logits.shape[0]).ready.route(logits, bias)
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
    return torch.ops.moe.training_route_backward(grad_weights, logits, expert_ids, ctx.pipeline), None, None


def refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "second derivative: expected a first one, got the gradient of a gradient of the layer; it has none (create_graph=True)"
    )


define("training_route", library.infer_schema(_route, mutates_args=()), _route, _fake_route)
define(
    "training_route_backward",
    library.infer_schema(_route_backward, mutates_args=()),
    _route_backward,
    _fake_route_backward,
)
library.register_autograd("moe::training_route", _backward_of_route, setup_context=_keep_for_route)
library.register_autograd("moe::training_route_backward", refuse_second_derivative)
