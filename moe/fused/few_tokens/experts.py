"""Stages 2 to 5 for few tokens in two launches: no permutation, a row is a slot."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.flow import Added, SwigluParams, TopK
from moe.fused.few_tokens.checks import check_experts
from moe.fused.few_tokens.config import FewTokenConfig
from moe.fused.few_tokens.gemm1 import launch_few_token_gemm1
from moe.fused.few_tokens.gemm2_finalize import launch_few_token_gemm2_finalize


def few_token_experts(
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
    """Chosen experts and hidden states -> [T, H] bf16: stands for permute, gemm1, gemm2 and finalize.

    The same three roundings as that chain, and bits that do not depend on the other tokens of the batch. Right for any
    number of tokens; faster than the chain up to about config.max_tokens.

    Args:
        topk: expert_ids [T, K] int32, of which those not local, garbage included, are skipped; weights [T, K].
        hidden_states: [T, H] bf16.
        w1, w2: bf16, config.gemm1.weight_shape and config.gemm2.weight_shape.
        swiglu: parameters of the activation by local expert, [E_local] fp32 each.
        output: [T, H] bf16 to write to, with memory of its own; None allocates.
        added: what a token gets beside its experts.
        w1_bias, w2_bias: bf16 or float32 [E_local, rows of W1] and [E_local, H], in the order of the weights' rows.

    Returns:
        [T, H] bf16: `output` itself where given. A token without local experts gets zeros, and what is added.

    Raises:
        ValueError: where a tensor does not fit the config, before anything is launched.
    """
    check_experts(config, topk, hidden_states, w1, w2, swiglu, output, added, w1_bias, w2_bias)
    return launch_few_token_experts(
        topk,
        hidden_states,
        w1,
        w2,
        config=config,
        swiglu=swiglu,
        output=output,
        added=added,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def launch_few_token_experts(
    topk: TopK,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    config: FewTokenConfig,
    swiglu: SwigluParams | None,
    output: Tensor | None,
    added: Added | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """`few_token_experts` of tensors that were checked."""
    activation = launch_few_token_gemm1(hidden_states, w1, topk, config=config, swiglu=swiglu, bias=w1_bias)
    if output is None:
        output = torch.empty_like(hidden_states)  # quicker than by shape, dtype and device
    return launch_few_token_gemm2_finalize(
        activation, w2, topk, config=config, output=output, added=added, bias=w2_bias
    )
