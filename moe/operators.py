"""Chosen experts as an operator of torch: what compiled and exported models and engines call. Importing this registers all of ours."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from moe.call import refuse_gradients
from moe.config import MoEConfig
from moe.expert_ids import as_int32_ids
from moe.flow import TopK
from moe.gemm.config import WeightFormat, WeightLayout
from moe.gemm.numbers import numbers_by_expert
from moe.traced import define, is_traced
from moe.tuning.tuned import TunedPipeline, tuned_pipeline


def run_experts(
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    alpha: float | None = None,
    beta: float | None = None,
    clamp_limit: float | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    is_interleaved: bool = False,
    weighs_input: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """Chosen experts whose weights are all here: hidden_states [..., H] bfloat16 -> the same shape.

    Args:
        expert_ids: [T, K] of any integer dtype; ids outside [0, E) are skipped.
        expert_weights: [T, K] of any floating dtype.
        w1, w2: bfloat16, MajorK or MajorMn.
        activation, weight_layout: numbers of ActivationType and WeightLayout.
        alpha, beta, clamp_limit: as in SwigluParams, of all experts alike.
        w1_bias, w2_bias: [E, N] bfloat16 or float32, in the order of the weights' rows.
        is_interleaved: gate and up rows of w1 are neighbours.
        weighs_input: the weights go into the input of experts.
        added: [..., H] bfloat16 or float32, summed with each token's weighted rows.
    """
    layer = (activation, weight_layout, is_batch_invariant, alpha, beta, clamp_limit)
    more = (w1_bias, w2_bias, is_interleaved, weighs_input, added)
    return _run(None, hidden_states, expert_ids, expert_weights, w1, w2, *layer, *more)


def _run(
    output: Tensor | None,
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    alpha: float | None,
    beta: float | None,
    clamp_limit: float | None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    is_interleaved: bool = False,
    weighs_input: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    num_local_experts, hidden_size, intermediate_size = w2.shape
    if weight_layout == WeightLayout.MajorMn:
        hidden_size, intermediate_size = intermediate_size, hidden_size
    device = hidden_states.device
    pipeline = _pipeline(
        hidden_size,
        intermediate_size,
        num_local_experts,
        expert_ids.shape[-1],
        activation,
        weight_layout,
        is_batch_invariant,
        device,
        is_interleaved,
        weighs_input,
    )
    if expert_weights.dtype not in (torch.bfloat16, torch.float32):
        expert_weights = expert_weights.float()
    topk = TopK(as_int32_ids(expert_ids, num_local_experts), expert_weights.contiguous())
    swiglu = numbers_by_expert(alpha, beta, clamp_limit, num_local_experts, device)
    tokens = hidden_states.reshape(-1, hidden_size).contiguous()
    if added is not None:
        added = added.reshape(-1, hidden_size).contiguous()
    more = {"added": added, "w1_bias": w1_bias, "w2_bias": w2_bias}
    return pipeline.run_experts(topk, tokens, w1, w2, swiglu=swiglu, output=output, **more).view(hidden_states.shape)


def run_experts_into(
    output: Tensor | None, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor, *others: Any
) -> Tensor:
    """`run_experts` into memory of its own [T, H] bfloat16, where given; traced as the operator and a copy."""
    if not is_traced(hidden_states):
        return _run(output, hidden_states, expert_ids, expert_weights, *others)
    if torch.is_grad_enabled():
        refuse_gradients(
            {"hidden_states": hidden_states, "expert_weights": expert_weights, "w1": others[0], "w2": others[1]}
        )
    result = torch.ops.moe.run_experts(hidden_states, expert_ids, expert_weights, *others)
    return result if output is None else output.copy_(result)


def _fake_experts(hidden_states: Tensor, *_others: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


define("run_experts", library.infer_schema(run_experts, mutates_args=()), run_experts, _fake_experts)


@cache
def _pipeline(
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    top_k: int,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: torch.device,
    is_interleaved: bool,
    weighs_input: bool,
) -> TunedPipeline:
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        # A rank may hold fewer experts than a token chooses; the ids beyond its own are then experts elsewhere.
        num_experts=max(num_local_experts, top_k),
        num_local_experts=num_local_experts,
        top_k=top_k,
        activation=activation,
        weight_format=WeightFormat(
            layout=WeightLayout(weight_layout), gate_up_order="interleaved" if is_interleaved else "gate_up"
        ),
        is_batch_invariant=is_batch_invariant,
        weight_on="input" if weighs_input else "output",
    )
    return tuned_pipeline(config, device)
