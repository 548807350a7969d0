"""Experts of a Hugging Face model under autograd: the training pipeline of their numbers, by operators that torch.compile takes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.expert_ids import as_int32_ids
from moe.flow import TopK
from moe.gemm.backward.checks import TRAINED_ACTIVATIONS
from moe.gemm.config import WeightFormat, WeightLayout
from moe.integrations.hf_experts import Form
from moe.training.compose import build_training_pipeline
from moe.training.experts import GradBuffers
from moe.training.experts_operator import parameters_of_all, run_experts


def wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_trained(form: Form) -> bool:
    """Whether experts of this form have gradients here."""
    return form.activation in TRAINED_ACTIVATIONS and not form.is_interleaved and not form.has_bias


def train_experts(
    form: Form,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    is_batch_invariant: bool,
    weighs_input: bool,
    added: Tensor | None,
) -> Tensor:
    """`moe.operators.run_experts` of a trained form, differentiable for tokens, top_k_weights, both weights and what is added."""
    if weighs_input:
        return _train_weighed(
            form, hidden_states, top_k_index, top_k_weights, w1, w2, is_batch_invariant=is_batch_invariant, added=added
        )
    output = _train(form, hidden_states, top_k_index, top_k_weights, w1, w2, is_batch_invariant=is_batch_invariant)
    return output if added is None else (output.float() + added.float()).to(output.dtype)


def _train_weighed(
    form: Form,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    is_batch_invariant: bool,
    added: Tensor | None,
) -> Tensor:
    """Each (token, choice) is a token of its own, weighed before and counted once after."""
    tokens, top_k = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.shape[-1]
    rows = (tokens[:, None].float() * top_k_weights[..., None].float()).to(tokens.dtype).flatten(0, 1)
    ones = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
    each = _train(form, rows, top_k_index.reshape(-1, 1), ones, w1, w2, is_batch_invariant=is_batch_invariant)
    total = each.view(len(tokens), top_k, tokens.shape[-1]).float().sum(dim=1)
    if added is not None:
        total = total + added.reshape(tokens.shape).float()
    return total.to(hidden_states.dtype).view(hidden_states.shape)


def _train(
    form: Form,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    is_batch_invariant: bool,
) -> Tensor:
    """With the bits of `moe.operators.run_experts`."""
    num_experts, hidden_size, intermediate_size = w2.shape
    if form.layout is WeightLayout.MajorMn:
        hidden_size, intermediate_size = intermediate_size, hidden_size
    assert form.activation is not None
    numbers = (num_experts, hidden_size, intermediate_size, top_k_index.shape[-1])
    # A string, which a compiled graph can hold.
    key = _key_of(*numbers, int(form.activation), int(form.layout), is_batch_invariant, str(hidden_states.device))
    if top_k_weights.dtype not in (torch.bfloat16, torch.float32):
        top_k_weights = top_k_weights.float()
    topk = TopK(as_int32_ids(top_k_index, num_experts), top_k_weights.contiguous())
    gate = (form.gate.alpha, form.gate.beta, form.gate.clamp_limit)
    parameters = parameters_of_all(*gate, num_experts, hidden_states)
    tokens = hidden_states.reshape(-1, hidden_size).contiguous()
    output = run_experts(tokens, topk, w1, w2, parameters, GradBuffers(), key)
    return output.view(hidden_states.shape)


@torch.compiler.assume_constant_result
def _key_of(*numbers: int | bool | str) -> str:
    return _kept_key_of(*numbers)


@cache
def _kept_key_of(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    top_k: int,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: str,
) -> str:
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        # A rank may hold fewer experts than a token chooses; the ids beyond its own are then experts elsewhere.
        num_experts=max(num_experts, top_k),
        num_local_experts=num_experts,
        top_k=top_k,
        activation=activation,
        weight_format=WeightFormat(layout=WeightLayout(weight_layout)),
        is_batch_invariant=is_batch_invariant,
    )
    return build_training_pipeline(config, device, is_tuned=True).key
