"""One call of experts of a Hugging Face model: checked, converted under autocast, and run by the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.integrations.hf_experts import Form, autocasts_to_bfloat16, expect_choice, expect_tensors
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
