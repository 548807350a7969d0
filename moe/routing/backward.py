"""The gradient of routing weights by logits on the GPU: check, allocate, launch. One launch."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from moe.checks import no_case
from moe.routing.backward_kernel import route_backward_kernel
from moe.routing.backward_reference import check_route_backward
from moe.routing.config import LOGITS_DTYPES, RoutingConfig, RoutingMethod
from moe.routing.reference import EPSILON
from moe.runtime.triton_launch import TritonKernel

EXPERTS_A_WARP = 256  # eight registers a lane of each vector over the experts
MAX_WARPS = 8


def route_backward(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, *, config: RoutingConfig) -> Tensor:
    """The gradient of the logits from that of the chosen experts' weights; as `route_backward_reference`, but not in float64.

    No atomics: the same bits each run.
    """
    check_route_backward(config, grad_weights, logits, expert_ids)
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"routing_logits: expected float32 or bfloat16, got {logits.dtype}; convert them, or use route_backward_reference"
        )
    return launch_route_backward(grad_weights, logits, expert_ids, config=config)


def launch_route_backward(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, *, config: RoutingConfig) -> Tensor:
    """`route_backward` of tensors that were checked."""
    grad_logits = logits.new_empty(logits.shape)
    if len(logits):
        _kernel_of(config).launch((len(logits), 1, 1), grad_weights, logits, expert_ids, grad_logits)
    return grad_logits


def takes(config: RoutingConfig) -> bool:
    """Whether the kernel has the rule. The reference has every one, on the GPU too."""
    return config.method in _RULES


_RULES = {
    RoutingMethod.DEFAULT: "softmax_of_all",
    RoutingMethod.RENORMALIZE: "softmax",
    RoutingMethod.RENORMALIZE_NAIVE: "softmax",
    RoutingMethod.TOPK: "logit",
    RoutingMethod.SIGMOID: "sigmoid",
    RoutingMethod.LLAMA4: "sigmoid",
    RoutingMethod.TOPK_SIGMOID: "sigmoid",
    RoutingMethod.SIGMOID_RENORM: "share",
    RoutingMethod.DEEPSEEK_V3: "scaled_share",
    RoutingMethod.MINIMAX2: "scaled_share",
}


@functools.cache
def _kernel_of(config: RoutingConfig) -> TritonKernel:
    rule = _RULES.get(config.method)
    if rule is None:
        raise no_case(config.method, "moe/routing/backward.py, _RULES")
    if rule == "share" and not config.norm_topk_prob:
        rule = "sigmoid"
    block_e = triton.next_power_of_2(config.num_experts)
    return TritonKernel(
        route_backward_kernel,
        NUM_EXPERTS=config.num_experts,
        TOP_K=config.top_k,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(config.top_k),
        RULE=rule,
        SCALE=config.routed_scaling_factor,
        EPSILON=EPSILON,
        num_warps=min(max(block_e // EXPERTS_A_WARP, 1), MAX_WARPS),
    )
