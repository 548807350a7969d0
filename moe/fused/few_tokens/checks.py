"""What the tensors of the few-token stages must be; each function raises before anything is launched or written."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.checks import expect, expect_separate, expect_type, is_as_expected
from moe.flow import Added, SwigluParams, TopK
from moe.fused.few_tokens.config import FewTokenConfig
from moe.gemm.checks import check_bias, check_swiglu, check_weights
from moe.permute.added import check_added, tensors_of

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)


def check_experts(
    config: FewTokenConfig,
    topk: TopK,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    swiglu: SwigluParams | None,
    output: Tensor | None,
    added: Added | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> None:
    """Raise unless all tensors fit: hidden_states [T, H], weights of weight_shape, output [T, H] of its own."""
    if swiglu is not None or not _fit(config, topk, hidden_states, w1, w2):
        check_slots(config, topk, hidden_states, w1, swiglu)
        check_weights(config.gemm2, "gemm2_weights", w2, topk.expert_ids.device)
    check_bias(config.gemm1, "gemm1_bias", w1_bias, topk.expert_ids.device)
    check_bias(config.gemm2, "gemm2_bias", w2_bias, topk.expert_ids.device)
    if added is not None:
        check_added(added, topk.expert_ids.shape[0], config.gemm2.out_features, topk.expert_ids.device)
    if output is not None:
        read = {"hidden_states": hidden_states, "gemm1_weights": w1, "gemm2_weights": w2, **tensors_of(added)}
        read |= {"gemm1_bias": w1_bias, "gemm2_bias": w2_bias}
        _check_output(config, topk, output, read)


def _fit(config: FewTokenConfig, topk: TopK, hidden_states: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Whether all of these pass their checks: told without messages, which take time to make."""
    if not isinstance(topk, TopK):
        return False
    ids, weights = topk.expert_ids, topk.weights
    if not isinstance(ids, Tensor) or not isinstance(weights, Tensor) or ids.dim() != 2:
        return False
    num_tokens, device = ids.shape[0], ids.device
    slots = (num_tokens, config.top_k)
    return (
        is_as_expected(ids, slots, torch.int32)
        and weights.dtype in WEIGHT_DTYPES
        and is_as_expected(weights, slots, weights.dtype, device)
        and is_as_expected(hidden_states, (num_tokens, config.gemm1.in_features), torch.bfloat16, device)
        and is_as_expected(w1, config.gemm1.weight_shape, torch.bfloat16, device)
        and is_as_expected(w2, config.gemm2.weight_shape, torch.bfloat16, device)
    )


def check_slots(
    config: FewTokenConfig,
    topk: TopK,
    hidden_states: Tensor,
    w1: Tensor,
    swiglu: SwigluParams | None,
    bias: Tensor | None = None,
) -> None:
    """Raise unless the tensors fit gemm1 of these slots."""
    dims = _check_topk(config, topk) | {"H": config.gemm1.in_features}
    device = topk.expert_ids.device
    expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device)
    check_weights(config.gemm1, "gemm1_weights", w1, device)
    check_swiglu(config.gemm1, swiglu, device)
    check_bias(config.gemm1, "gemm1_bias", bias, device)


def check_tokens(
    config: FewTokenConfig,
    topk: TopK,
    activation: Tensor,
    w2: Tensor,
    output: Tensor | None,
    added: Added | None = None,
    bias: Tensor | None = None,
) -> None:
    """Raise unless the tensors fit gemm2 of these slots and the sum of its rows: activation [T * K, I] bf16."""
    dims = _check_topk(config, topk)
    if added is not None:
        check_added(added, dims["T"], config.gemm2.out_features, topk.expert_ids.device)
    dims = {"slots": dims["T"] * config.top_k, "I": config.gemm2.in_features}
    device = topk.expert_ids.device
    expect("activation", activation, "slots I", dims, dtype=torch.bfloat16, device=device)
    check_weights(config.gemm2, "gemm2_weights", w2, device)
    check_bias(config.gemm2, "gemm2_bias", bias, device)
    read = {"activation": activation, "gemm2_weights": w2, "gemm2_bias": bias, **tensors_of(added)}
    _check_output(config, topk, output, read)


def _check_topk(config: FewTokenConfig, topk: TopK) -> dict[str, int]:
    expect_type("topk", topk, TopK, "moe.TopK(expert_ids, weights) makes one")
    dims = {"K": config.top_k}
    expect("expert_ids", topk.expert_ids, "T K", dims, dtype=torch.int32)
    expect("expert_weights", topk.weights, "T K", dims, dtype=WEIGHT_DTYPES, device=topk.expert_ids.device)
    return dims


def _check_output(config: FewTokenConfig, topk: TopK, output: Tensor | None, read: dict[str, Tensor | None]) -> None:
    if output is None:
        return
    dims = {"T": topk.expert_ids.shape[0], "H": config.gemm2.out_features}
    expect("output", output, "T H", dims, dtype=torch.bfloat16, device=topk.expert_ids.device)
    expect_separate("output", output, {**read, "expert_ids": topk.expert_ids, "expert_weights": topk.weights})
