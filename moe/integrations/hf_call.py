"""One call of experts of a Hugging Face model: checked, converted under autocast, and run by the layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.expert_linear import expert_linear
from moe.integrations.hf_experts import Form, autocasts_to_bfloat16, expect_choice, expect_tensors, weights_of
from moe.operators import is_traced
from moe.operators import run_experts as _run_experts


def call_experts(
    path: str,
    form: Form,
    weights: tuple[Tensor, Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    is_batch_invariant: bool,
) -> Tensor:
    """Arguments and result as `moe.integrations.huggingface.run_hf_experts`, by the weights in the layout of `form`.

    Raises:
        ValueError: a tensor that this package does not take; `path` says of which module.
    """
    w1, w2 = weights
    expect_tensors(path, hidden_states, w1, w2)
    expect_choice(path, top_k_index, top_k_weights)
    dtype = hidden_states.dtype
    if autocasts_to_bfloat16(hidden_states.device):
        hidden_states, w1, w2 = hidden_states.bfloat16(), w1.bfloat16(), w2.bfloat16()
    gate = form.gate
    assert form.activation is not None  # else call_apart
    run = torch.ops.moe.run_experts if is_traced(hidden_states) else _run_experts
    output = run(
        hidden_states,
        top_k_index,
        top_k_weights,
        w1,
        w2,
        int(form.activation),
        int(form.layout),
        is_batch_invariant,
        gate.alpha,
        gate.beta,
        gate.clamp_limit,
    )
    return output.to(dtype)


def call_each(
    path: str, form: Form, weights: tuple[Tensor, Tensor], rows: Tensor, ids: Tensor, *, is_batch_invariant: bool
) -> Tensor:
    """What each row's one expert makes of it, without a weight: rows [N, H] and ids [N] -> [N, H]."""
    ones = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
    return call_experts(path, form, weights, rows, ids[:, None], ones, is_batch_invariant=is_batch_invariant)


def call_normed(
    path: str,
    form: Form,
    weights: tuple[Tensor, Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    norm: nn.Module,
    *,
    is_batch_invariant: bool,
) -> Tensor:
    """`call_experts` with a norm on what each expert returns, before it is weighed. Holds [T, K, H] twice."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    top_k = top_k_index.shape[-1]
    rows = tokens.repeat_interleave(top_k, dim=0)
    each = norm(call_each(path, form, weights, rows, top_k_index.flatten(), is_batch_invariant=is_batch_invariant))
    weighed = each.view(len(tokens), top_k, -1).float() * top_k_weights[..., None].float()
    return weighed.sum(dim=1).to(hidden_states.dtype).view(hidden_states.shape)


def call_apart(
    path: str,
    form: Form,
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    is_batch_invariant: bool,
) -> Tensor:
    """Experts with biases, or an activation that no kernel has: their two matrices by the layer's GEMMs, their own code between.

    Rounds gate and up to bfloat16, as transformers does, and holds [T, K, 2I].
    """
    w1, w2 = weights_of(experts)
    expect_tensors(path, hidden_states, w1, w2)
    expect_choice(path, top_k_index, top_k_weights)
    dtype, top_k, num_experts = hidden_states.dtype, top_k_index.shape[-1], w2.shape[0]
    if autocasts_to_bfloat16(hidden_states.device):
        hidden_states, w1, w2 = hidden_states.bfloat16(), w1.bfloat16(), w2.bfloat16()
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.flatten().long()
    is_absent = (ids < 0) | (ids >= num_experts)
    ids = torch.where(is_absent, num_experts, ids)
    run = torch.ops.moe.expert_linear if is_traced(hidden_states) else expert_linear
    linear = partial(run, weight_layout=int(form.layout), is_batch_invariant=is_batch_invariant)
    biased = ids.clamp(max=num_experts - 1)
    has_gate, has_bias = getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)
    up_name = "gate_up_proj" if has_gate else "up_proj"
    rows = linear(tokens.repeat_interleave(top_k, dim=0), ids, w1)
    if has_bias:
        rows = rows + getattr(experts, f"{up_name}_bias")[biased].to(rows.dtype)
    rows = experts._apply_gate(rows) if has_gate else experts.act_fn(rows)
    rows = linear(rows.bfloat16().contiguous(), ids, w2)
    if has_bias:
        rows = rows + experts.down_proj_bias[biased].to(rows.dtype)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    weighted = torch.where(is_absent[:, None], 0.0, rows.float() * top_k_weights.flatten()[:, None].float())
    return weighted.view(len(tokens), top_k, weighted.shape[-1]).sum(dim=1).to(dtype).view(hidden_states.shape)
