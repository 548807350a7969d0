"""Routing in plain torch, on any device: what defines the right choice, and the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.checks import expect, no_case
from moe.expert_ids import ID_DTYPES, as_int32_ids
from moe.flow import TopK
from moe.routing.config import RoutingConfig, RoutingMethod

EPSILON = 1e-20  # keeps a sum of sigmoids that all underflow from dividing by zero
_LOWEST = -(1 << 31)  # below every place: not a candidate
_PLACE_OF_NAN = 0x7FC00000


def select_experts_reference(
    logits: Tensor, bias: Tensor | None = None, *, config: RoutingConfig, replay_out: Tensor | None = None
) -> TopK:
    """Choose each token's K best experts and weigh them.

    An expert's key and weight are the method's functions of its logit, in float32; weights are rounded once, to bfloat16.
    Keys are ordered by the integer image of their bits, so the order is total: NaN above inf, -0.0 below +0.0, the lower id
    first among equals. A raw logit keeps its NaN's sign (-NaN lies below -inf); the NaNs of computed keys are all the same.
    Does not wait for the device.

    Args:
        logits: [T, E] float32 or bfloat16.
        bias: [E] bfloat16 or float32, or None for zero. Methods without a bias check and ignore it; grouped DeepSeekV3
            rounds it to bfloat16 first.
        config: the rule.
        replay_out: [>=T, K] int16; rows [0, T) receive the chosen ids.
    Returns:
        expert_ids [T, K] int32, distinct, best first; weights [T, K] bfloat16.
    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    Source: the routing kernels of flashinfer's trtllm-gen MoE, include/flashinfer/trtllm/fused_moe.
    """
    config.check(logits, bias, replay_out)
    x = logits.float()  # [T, E]
    keys = _keys(x, bias, config)
    places = _places_of_logits(keys) if keys is x else _places_of_scores(keys)
    if config.is_grouped:
        places = places.masked_fill(~_in_best_groups(keys, config), _LOWEST)
    expert_ids = _best(places, config.top_k)  # [T, K]
    weights = _weights(x.gather(1, expert_ids), keys.gather(1, expert_ids), config)
    if replay_out is not None:
        with torch.inference_mode():  # where the caller may have allocated it
            replay_out[: logits.shape[0]] = expert_ids
    return TopK(expert_ids.to(torch.int32), weights.to(torch.bfloat16))


def weigh_experts(logits: Tensor, expert_ids: Tensor, *, config: RoutingConfig) -> TopK:
    """Weigh experts that were chosen before, as the rule weighs its own choices: routing is replayed.

    Does not wait for the device, and may be captured in a CUDA graph.

    Args:
        logits: [T, E] float32 or bfloat16.
        expert_ids: [T, K] of any integer dtype, as `replay_out` recorded them. An id outside [0, E) stands for no expert: its
            weight is 0, and it has no part in a sum over the chosen experts.
        config: the rule. A bias would have no part: it chooses, and does not weigh.
    Returns:
        expert_ids as int32, and weights [T, K] bfloat16: those of `select_experts_reference` where it chooses the same experts.
    Raises:
        TypeError: a config of something else, as of a whole layer.
        ValueError: naming the tensor, what was wanted and what came.
    """
    if not isinstance(config, RoutingConfig):
        cure = (
            "pass config.routing"
            if hasattr(config, "routing")
            else "pass RoutingConfig(num_experts=.., top_k=.., method=..)"
        )
        raise TypeError(f"config: expected a RoutingConfig, got {type(config).__name__}; {cure}")
    config.check(logits, None, None)
    dims = {"T": logits.shape[0], "K": config.top_k}
    expect("expert_ids", expert_ids, "T K", dims, dtype=ID_DTYPES, device=logits.device)
    expert_ids = as_int32_ids(expert_ids, config.num_experts)
    x = logits.float()  # [T, E]
    is_expert = (expert_ids >= 0) & (expert_ids < config.num_experts)
    index = torch.where(is_expert, expert_ids, 0).long()
    chosen = x.gather(1, index).masked_fill(~is_expert, -torch.inf)
    weights = _weights(chosen, _keys(x, None, config).gather(1, index), config).masked_fill(~is_expert, 0.0)
    return TopK(expert_ids, weights.to(torch.bfloat16))


def sigmoid(x: Tensor) -> Tensor:
    """0.5 tanh(x / 2) + 0.5: exactly 0 and 1 in float32 beyond about -17 and 17."""
    return 0.5 * torch.tanh(0.5 * x) + 0.5


def softmax_of_chosen(x: Tensor) -> Tensor:
    """Renormalize: exp(x) over its sum."""
    return torch.softmax(x, dim=1)


def share_of_sigmoids(x: Tensor) -> Tensor:
    """SigmoidRenorm: sig(x) over its sum, which is 1e-20 at least."""
    terms = sigmoid(x)
    return terms / terms.sum(dim=1, keepdim=True).clamp(min=EPSILON)


def scaled_share_of_sigmoids(x: Tensor, scale: float) -> Tensor:
    """DeepSeekV3 and MiniMax2: sig(x) times the scale over (its sum + 1e-20)."""
    terms = sigmoid(x)
    return terms * scale / (terms.sum(dim=1, keepdim=True) + EPSILON)


def _keys(x: Tensor, bias: Tensor | None, config: RoutingConfig) -> Tensor:
    """What experts are ordered by, [T, E] float32; `x` itself where that is the logit."""
    match config.method:
        case RoutingMethod.DEFAULT:
            return torch.softmax(x, dim=1)
        case RoutingMethod.SIGMOID_RENORM | RoutingMethod.SIGMOID:
            return sigmoid(x)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            if bias is None:
                return sigmoid(x)
            return sigmoid(x) + (bias.to(torch.bfloat16) if config.is_grouped else bias).float()
        case (
            RoutingMethod.RENORMALIZE
            | RoutingMethod.RENORMALIZE_NAIVE
            | RoutingMethod.TOPK
            | RoutingMethod.LLAMA4
            | RoutingMethod.TOPK_SIGMOID
        ):
            return x
    raise no_case(config.method, "moe/routing/reference.py, _keys")


def _weights(x: Tensor, keys: Tensor, config: RoutingConfig) -> Tensor:
    """Weights of the chosen experts from their logits and keys, [T, K] float32."""
    match config.method:
        case RoutingMethod.DEFAULT:
            return keys
        case RoutingMethod.RENORMALIZE | RoutingMethod.RENORMALIZE_NAIVE:
            return softmax_of_chosen(x)
        case RoutingMethod.TOPK:
            return x
        case RoutingMethod.SIGMOID_RENORM if config.norm_topk_prob:
            return share_of_sigmoids(x)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            return scaled_share_of_sigmoids(x, config.routed_scaling_factor)
        case RoutingMethod.SIGMOID_RENORM | RoutingMethod.SIGMOID | RoutingMethod.LLAMA4 | RoutingMethod.TOPK_SIGMOID:
            return sigmoid(x)
    raise no_case(config.method, "moe/routing/reference.py, _weights")


def _in_best_groups(keys: Tensor, config: RoutingConfig) -> Tensor:
    """Whether each expert is in one of the topk_group best groups, [T, E]. A group's score is the sum of its two best keys."""
    grouped = keys.unflatten(1, (config.n_group, -1))  # [T, G, E / G]
    two_best = grouped.gather(2, _best(_places_of_scores(grouped), 2))  # [T, G, 2]
    best_groups = _best(_places_of_scores(two_best.sum(dim=2)), config.topk_group)
    is_best = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=keys.device).scatter(1, best_groups, True)
    return is_best.unsqueeze(2).expand_as(grouped).flatten(1)


def _places_of_logits(values: Tensor) -> Tensor:
    """Each float32's place in the total order, int32."""
    bits = values.view(torch.int32)
    places = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return places.clamp(min=_LOWEST + 1)  # the NaN of all ones takes its neighbour's place


def _places_of_scores(values: Tensor) -> Tensor:
    """The same for computed values, whose NaNs have no sign or payload to rely on."""
    return _places_of_logits(values).masked_fill(values.isnan(), _PLACE_OF_NAN)


def _best(places: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest places in the last dimension, best first, the lower index among equals."""
    return torch.sort(places, dim=-1, descending=True, stable=True).indices[..., :count]
