"""The gradient of routing weights by logits, in torch: what is right, and the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.checks import expect, no_case
from moe.routing.config import LOGITS_DTYPES, RoutingConfig, RoutingMethod
from moe.routing.reference import EPSILON, sigmoid

FLOAT32 = (torch.float32,)


def route_backward_reference(
    grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, *, config: RoutingConfig
) -> Tensor:
    """The gradient of the logits from that of the chosen experts' weights. Which experts are chosen is a constant.

    So a bias, which chooses and does not weigh, has none. Weights are computed anew in float32, and differentiated before
    their rounding to bfloat16.

    Args:
        grad_weights: [T, K] float32. Of slots whose expert lies elsewhere, what came back from there.
        logits: [T, E] float32 or bfloat16.
        expert_ids: [T, K] int32, chosen by the rule or replayed. An id outside [0, E) stands for no expert: it has no part.
        config: the rule.

    Returns:
        [T, E] in the dtype of the logits. A logit that has no part in a weight gets exactly 0: all but the chosen ones,
        except with method Default, whose softmax is over all of them.

    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    """
    check_route_backward(config, grad_weights, logits, expert_ids)
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_expert = (expert_ids >= 0) & (expert_ids < config.num_experts)
    index = torch.where(is_expert, expert_ids, 0).long()
    x, g = logits.to(wide), grad_weights.to(wide).masked_fill(~is_expert, 0.0)
    if config.method is RoutingMethod.DEFAULT:
        shares = torch.softmax(x, dim=1)
        grads = torch.zeros_like(x).scatter_add_(1, index, g)
        return (shares * (grads - (grads * shares).sum(dim=1, keepdim=True))).to(logits.dtype)
    chosen = x.gather(1, index).masked_fill(~is_expert, -torch.inf)
    by_chosen = _by_chosen(g, chosen, config).masked_fill(~is_expert, 0.0)
    return torch.zeros_like(x).scatter_add_(1, index, by_chosen).to(logits.dtype)


def check_route_backward(config: RoutingConfig, grad_weights: Tensor, logits: Tensor, expert_ids: Tensor) -> None:
    """Raise unless these fit: logits [T, E] in float32 or bfloat16 (or all in float64, for the reference alone), the rest [T, K]."""
    dims = {"E": config.num_experts, "K": config.top_k}
    is_double = isinstance(logits, Tensor) and logits.dtype == torch.float64
    allowed = (torch.float64,) if is_double else LOGITS_DTYPES
    expect("routing_logits", logits, "T E", dims, dtype=allowed)
    expected = (torch.float64,) if is_double else FLOAT32
    expect("grad_weights", grad_weights, "T K", dims, dtype=expected, device=logits.device)
    expect("expert_ids", expert_ids, "T K", dims, dtype=torch.int32, device=logits.device)


def _by_chosen(g: Tensor, x: Tensor, config: RoutingConfig) -> Tensor:
    """The gradient of the chosen experts' logits x [T, K], -inf where there is no expert, from that of their weights."""
    if config.method in (RoutingMethod.RENORMALIZE, RoutingMethod.RENORMALIZE_NAIVE):
        shares = torch.softmax(x, dim=1)
        return shares * (g - (g * shares).sum(dim=1, keepdim=True))
    if config.method is RoutingMethod.TOPK:
        return g
    terms = sigmoid(x)
    slope = terms * (1 - terms)
    total = terms.sum(dim=1, keepdim=True)
    dot = (g * terms).sum(dim=1, keepdim=True)
    match config.method:
        case RoutingMethod.SIGMOID_RENORM if config.norm_topk_prob:
            divisor = total.clamp(min=EPSILON)
            through_total = torch.where(total >= EPSILON, dot / divisor, 0.0)
            return slope * (g - through_total) / divisor
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            divisor = total + EPSILON
            return slope * config.routed_scaling_factor * (g - dot / divisor) / divisor
        case RoutingMethod.SIGMOID_RENORM | RoutingMethod.SIGMOID | RoutingMethod.LLAMA4 | RoutingMethod.TOPK_SIGMOID:
            return slope * g
    raise no_case(config.method, "moe/routing/backward_reference.py, _by_chosen")
