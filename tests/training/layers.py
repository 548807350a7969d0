"""Whole layers under autograd, and their gradients in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gemm.backward.cases import BackwardCase, differentiable_experts, make_backward_case
from torch import Tensor

import moe
from moe.flow import SwigluParams, TopK
from moe.routing.reference import _keys, _weights

NAMES = ("logits", "hidden_states", "w1", "w2")


class Leaves(NamedTuple):
    """Tensors of their own that want gradients."""

    logits: Tensor
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor

    @property
    def grads(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name).grad for name in NAMES}


def logits_for(case: BackwardCase, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(case.hidden_states), case.config.num_experts, generator=generator)
    return logits.to(case.hidden_states.device)


def leaves_of(case: BackwardCase, *, frozen: tuple[str, ...] = ()) -> Leaves:
    tensors = (logits_for(case), case.hidden_states, case.w1, case.w2)
    return Leaves(*(tensor.clone().requires_grad_(name not in frozen) for name, tensor in zip(NAMES, tensors)))


def trained(training: Any, case: BackwardCase, leaves: Leaves | None = None, **more: Any) -> tuple[Tensor, Leaves]:
    """The output, and the leaves with their gradients."""
    leaves = leaves or leaves_of(case)
    output = training(*leaves, swiglu=case.swiglu, **more)
    output.backward(case.grad_output)
    return output.detach(), leaves


def exact_layer(case: BackwardCase, expert_ids: Tensor) -> dict[str, Tensor]:
    """The gradients in float64, with these experts chosen. For the default weight format."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in leaves_of(case)]
    logits, x, w1, w2 = leaves
    config = case.config.routing
    index = expert_ids.long()
    weights = _weights(logits.gather(1, index), _keys(logits, None, config).gather(1, index), config)
    output = differentiable_experts(case, TopK(expert_ids, weights), x, w1, w2, case.swiglu or SwigluParams())
    grads = torch.autograd.grad(output, leaves, case.grad_output.double(), materialize_grads=True)
    return dict(zip(NAMES, grads))


def make_layer(device: torch.device | str, **changes: Any) -> tuple[BackwardCase, moe.TrainingPipeline]:
    options = {name: changes.pop(name) for name in ("recompute", "is_tuned") if name in changes}
    case = make_backward_case(device=device, **changes)
    return case, moe.build_training_pipeline(case.config, device, **options)
