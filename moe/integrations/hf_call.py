"""One call of experts of a Hugging Face model: checked, converted under autocast, and run by the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.expert_linear import expert_linear
from moe.gemm.config import WeightLayout
from moe.integrations.hf_experts import (
    Form,
    autocasts_to_bfloat16,
    biases_of,
    expect_choice,
    expect_no_gradients,
    expect_tensors,
    weights_of,
)
from moe.integrations.hf_training import is_trained, train_experts, wants_gradients
from moe.operators import run_experts as _run_experts
from moe.traced import is_traced


def call_experts(
    path: str,
    form: Form,
    weights: tuple[Tensor, Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    is_batch_invariant: bool,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    weighs_input: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """Arguments and result as `moe.integrations.huggingface.run_hf_experts`, by the weights in the layout of `form`.

    Where a gradient is wanted, the same by operators that autograd can differentiate: with the same bits, but where the input
    is weighed or something added.

    Args:
        biases, weighs_input, added: as `moe.operators.run_experts` takes them.

    Raises:
        ValueError: a tensor that this package does not take; `path` says of which module.
    """
    w1, w2 = weights
    expect_tensors(path, hidden_states, w1, w2, biases)
    expect_choice(path, top_k_index, top_k_weights)
    dtype = hidden_states.dtype
    if autocasts_to_bfloat16(hidden_states.device):
        hidden_states, w1, w2 = hidden_states.bfloat16(), w1.bfloat16(), w2.bfloat16()
    if wants_gradients(hidden_states, top_k_weights, w1, w2, *biases, added):
        if not is_trained(form):
            expect_no_gradients(path, hidden_states, w1, w2, biases)
        more: dict[str, Any] = {
            "is_batch_invariant": is_batch_invariant,
            "weighs_input": weighs_input,
            "added": added,
        }
        return train_experts(form, hidden_states, top_k_index, top_k_weights, w1, w2, **more).to(dtype)
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
        *biases,
        form.is_interleaved,
        weighs_input,
        added,
    )
    return output.to(dtype)


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
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`call_experts` with a norm on what each expert returns, before it is weighed. Holds [T, K, H] twice."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    top_k = top_k_index.shape[-1]
    rows, ids = tokens.repeat_interleave(top_k, dim=0), top_k_index.flatten()[:, None]
    ones = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
    each = norm(
        call_experts(path, form, weights, rows, ids, ones, is_batch_invariant=is_batch_invariant, biases=biases)
    )
    weighed = each.view(len(tokens), top_k, -1).float() * top_k_weights[..., None].float()
    return weighed.sum(dim=1).to(hidden_states.dtype).view(hidden_states.shape)


Linear = Callable[..., Tensor]  # (rows [N, K], weights, layout) -> [N, M]: each row by its expert's matrix


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
    """Experts with an activation that no kernel has: their two matrices by the layer's GEMMs, their own code between."""
    weights, (w1_bias, w2_bias) = weights_of(experts), biases_of(experts, form)
    num_experts = len(weights[1])
    biased = top_k_index.flatten().long().clamp(0, num_experts - 1)

    def between(linear: Linear, rows: Tensor) -> Tensor:
        rows = linear(rows, weights[0], form.layout)
        if w1_bias is not None:
            rows = rows + w1_bias[biased].to(rows.dtype)
        return experts._apply_gate(rows) if getattr(experts, "has_gate", True) else experts.act_fn(rows)

    def after(rows: Tensor) -> Tensor:
        if w2_bias is not None:
            rows = rows + w2_bias[biased].to(rows.dtype)
        return experts.post_expert_norm(rows) if getattr(experts, "has_post_expert_norm", False) else rows

    inputs = (hidden_states, top_k_index, top_k_weights)
    return call_between(
        path, weights, form.layout, *inputs, between=between, after=after, is_batch_invariant=is_batch_invariant
    )


def call_between(
    path: str,
    weights: tuple[Tensor, Tensor],
    down_layout: WeightLayout,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    between: Callable[[Linear, Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
    is_batch_invariant: bool,
) -> Tensor:
    """Experts of any activation: `between` gives what their last matrix is multiplied by, from a row a (token, choice).

    Rounds what matrices give to bfloat16, as transformers does, and holds [T, K, 2I].

    Args:
        weights: the first, which is only checked, and the last.
        after: of the last matrix's rows, before they are weighed.
    """
    expect_tensors(path, hidden_states, *weights)
    expect_choice(path, top_k_index, top_k_weights)
    top_k, num_experts = top_k_index.shape[-1], len(weights[1])
    run = torch.ops.moe.expert_linear if is_traced(hidden_states) or torch.is_grad_enabled() else expert_linear
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).bfloat16()
    ids = top_k_index.flatten().long()
    is_absent = (ids < 0) | (ids >= num_experts)
    ids = torch.where(is_absent, num_experts, ids)

    def linear(rows: Tensor, matrices: Tensor, layout: WeightLayout) -> Tensor:
        return run(rows.bfloat16().contiguous(), ids, matrices.bfloat16(), int(layout), is_batch_invariant)

    rows = linear(between(linear, tokens.repeat_interleave(top_k, dim=0)), weights[1], down_layout)
    rows = rows if after is None else after(rows)
    weighted = torch.where(is_absent[:, None], 0.0, rows.float() * top_k_weights.flatten()[:, None].float())
    summed = weighted.view(len(tokens), top_k, weighted.shape[-1]).sum(dim=1)
    return summed.to(hidden_states.dtype).view(hidden_states.shape)
