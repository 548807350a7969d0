"""The few-token stages in torch: fp32 maths an expert at a time, the same three roundings. Any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.flow import Added, SwigluParams, TopK
from moe.fused.few_tokens.checks import check_experts, check_slots, check_tokens
from moe.fused.few_tokens.config import FewTokenConfig
from moe.gemm.reference import activate_reference, bias_of_expert, product_in_fp32
from moe.gemm.weight_format import unpack_expert
from moe.permute.added import add_to


def few_token_gemm1_reference(
    hidden_states: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    swiglu: SwigluParams | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """activation(hidden_states[slot // K] @ W1[expert_ids[slot]]^T + bias); arguments and result as `few_token_gemm1`."""
    check_slots(config, topk, hidden_states, weights, swiglu, bias)
    gemm = config.gemm1
    out = hidden_states.new_empty(topk.expert_ids.numel(), gemm.out_features)
    for expert, slots in _slots_of_experts(topk, config):
        weight = unpack_expert(weights[expert], gemm.weight_format, is_gated=gemm.is_gated)
        product = product_in_fp32(hidden_states[slots // config.top_k], weight) + bias_of_expert(bias, expert, gemm)
        out[slots] = activate_reference(product, expert, gemm, swiglu).bfloat16()
    return out


def few_token_gemm2_finalize_reference(
    activation: Tensor,
    weights: Tensor,
    topk: TopK,
    *,
    config: FewTokenConfig,
    output: Tensor | None = None,
    added: Added | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """sum over k of weights[t, k] * bf16(row of slot @ W2^T + bias); arguments and result as `few_token_gemm2_finalize`."""
    check_tokens(config, topk, activation, weights, output, added, bias)
    gemm = config.gemm2
    num_tokens, top_k = topk.expert_ids.shape
    # Weighted after the rounding; a slot without a local expert adds nothing.
    addends = torch.zeros(num_tokens * top_k, gemm.out_features, dtype=torch.float32, device=activation.device)
    for expert, slots in _slots_of_experts(topk, config):
        weight = unpack_expert(weights[expert], gemm.weight_format, is_gated=False)
        row = (product_in_fp32(activation[slots], weight) + bias_of_expert(bias, expert, gemm)).bfloat16()
        addends[slots] = topk.weights.flatten()[slots, None].float() * row.float()
    total = torch.zeros(num_tokens, gemm.out_features, dtype=torch.float32, device=activation.device)
    for choice in range(top_k):
        total += addends[choice::top_k]
    total = add_to(total, added)
    if output is None:
        return total.bfloat16()
    with torch.inference_mode():  # where the caller may have allocated it
        output.copy_(total)
    return output


def few_token_experts_reference(
    topk: TopK,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    config: FewTokenConfig,
    swiglu: SwigluParams | None = None,
    output: Tensor | None = None,
    added: Added | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """Permute, gemm1, gemm2 and finalize in one; arguments and result as `few_token_experts`."""
    check_experts(config, topk, hidden_states, w1, w2, swiglu, output, added, w1_bias, w2_bias)
    activation = few_token_gemm1_reference(hidden_states, w1, topk, config=config, swiglu=swiglu, bias=w1_bias)
    return few_token_gemm2_finalize_reference(
        activation, w2, topk, config=config, output=output, added=added, bias=w2_bias
    )


def _slots_of_experts(topk: TopK, config: FewTokenConfig) -> Iterator[tuple[int, Tensor]]:
    """Each local expert that has slots, and which they are."""
    expert_of_slot = topk.expert_ids.flatten().long() - config.local_expert_offset
    for expert in range(config.gemm1.num_experts):
        slots = (expert_of_slot == expert).nonzero().squeeze(1)
        if len(slots):
            yield expert, slots
