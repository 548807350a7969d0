"""Routing on the GPU: check, allocate, choose the kernel, launch. One launch, no scratch memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import TopK
from moe.routing.config import RoutingConfig, RoutingMethod
from moe.routing.groups_device import build_keep_best_groups, build_keep_lanes_of_best_groups, fill_lanes
from moe.routing.keys_device import float_of_bfloat16, float_of_float32, rounded_to_bfloat16
from moe.routing.rules_device import rule_of
from moe.routing.selection_device import slots_per_lane
from moe.routing.topk_kernel import build_topk_kernel
from moe.runtime.dependent_launch import launches_dependents
from moe.runtime.numba_launch import NumbaKernel
from moe.runtime.numba_warp_device import WARP_SIZE
from moe.runtime.scratch import new_scratch

MAX_EXPERTS = 2048  # a lane holds up to 64 scores in registers
MAX_TOP_K = WARP_SIZE  # a lane holds one choice
MAX_LOAD_WIDTH = 4  # 16 bytes of float32
METHODS = (  # those of which `rule_of` makes a kernel
    RoutingMethod.DEFAULT,
    RoutingMethod.RENORMALIZE,
    RoutingMethod.DEEPSEEK_V3,
    RoutingMethod.LLAMA4,
    RoutingMethod.RENORMALIZE_NAIVE,
    RoutingMethod.TOPK,
    RoutingMethod.SIGMOID_RENORM,
    RoutingMethod.MINIMAX2,
    RoutingMethod.SIGMOID,
    RoutingMethod.TOPK_SIGMOID,
)
WARPS_PER_BLOCK = 4


def takes(config: RoutingConfig) -> bool:
    """Whether the kernels take this config. The reference takes every one, on the GPU too."""
    return config.method in METHODS and config.num_experts <= MAX_EXPERTS and config.top_k <= MAX_TOP_K


def select_experts(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    config: RoutingConfig,
    replay_out: Tensor | None = None,
    uses_pdl: bool = False,
) -> TopK:
    """Choose each token's K best experts and weigh them. As `select_experts_reference`, with the same result.

    Args:
        logits: [T, E] float32 or bfloat16.
        bias: [E] bfloat16 or float32, or None for zero. Methods without a bias check and ignore it.
        config: the rule; E up to 2048 and K up to 32.
        replay_out: [>=T, K] int16; rows [0, T) receive the chosen ids.
        uses_pdl: the launch is a dependent one of the launch before it, and lets one that follows start early
            (`moe.runtime.dependent_launch`), where the GPU has them.
    Returns:
        expert_ids [T, K] int32, distinct, best first; weights [T, K] bfloat16.
    Raises:
        ValueError: naming the tensor, what was wanted and what came; or the config is beyond the kernels.
    """
    config.check(logits, bias, replay_out)
    if not takes(config):
        raise ValueError(
            f"config: expected a method with a kernel, num_experts <= {MAX_EXPERTS} and top_k <= {MAX_TOP_K}, got method="
            f"{config.method.value}, num_experts={config.num_experts}, top_k={config.top_k}; use select_experts_reference, which runs on the GPU too"
        )
    return launch_select_experts(logits, bias, config=config, replay_out=replay_out, uses_pdl=uses_pdl)


def launch_select_experts(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    config: RoutingConfig,
    replay_out: Tensor | None = None,
    uses_pdl: bool = False,
) -> TopK:
    """`select_experts` of tensors that were checked, for a config that the kernels take."""
    num_tokens = logits.shape[0]
    shape = (num_tokens, config.top_k)
    expert_ids, weights = new_scratch(logits, shape, torch.int32), new_scratch(logits, shape, torch.bfloat16)
    if num_tokens:
        used_bias = bias if bias is not None and config.method.uses_bias else None
        bias_dtype = None if used_bias is None else used_bias.dtype
        uses_pdl = uses_pdl and launches_dependents(logits.device)
        kernel = kernel_of(config, logits.dtype, bias_dtype, replay_out is not None, uses_pdl=uses_pdl)
        num_blocks = -(-num_tokens // WARPS_PER_BLOCK)
        kernel.launch(num_blocks, logits, used_bias, expert_ids, weights, replay_out, num_tokens, uses_pdl=uses_pdl)
    return TopK(expert_ids, weights)


@functools.cache
def kernel_of(
    config: RoutingConfig,
    logits_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    writes_replay: bool,
    *,
    uses_pdl: bool = False,
) -> NumbaKernel:
    """The kernel of a config, for logits and bias (None: without) of these dtypes. See `build_topk_kernel`."""
    keep_best_groups = keep_lanes_of_best_groups = None
    num_slots = slots_per_lane(config.num_experts)
    num_lanes = -(-config.num_experts // num_slots)
    if config.is_grouped:
        num_lanes = num_lanes * config.topk_group // config.n_group
    groups = {
        "num_experts": config.num_experts,
        "num_slots": num_slots,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
    }
    if config.is_grouped and fill_lanes(config.num_experts, num_slots, config.n_group):
        keep_lanes_of_best_groups = build_keep_lanes_of_best_groups(**groups)
    elif config.is_grouped:
        keep_best_groups = build_keep_best_groups(**groups, num_warps=WARPS_PER_BLOCK)
    bias_of = _FLOAT_OF[bias_dtype] if bias_dtype else None
    function = build_topk_kernel(
        rule_of(config),
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_warps=WARPS_PER_BLOCK,
        num_lanes=num_lanes,
        load_width=_load_width(config.num_experts),
        logit_of=_FLOAT_OF[logits_dtype],
        bias_of=rounded_to_bfloat16 if config.is_grouped and bias_dtype is torch.float32 else bias_of,
        keep_best_groups=keep_best_groups,
        keep_lanes_of_best_groups=keep_lanes_of_best_groups,
        writes_replay=writes_replay,
        uses_pdl=uses_pdl,
    )
    inputs = (_POINTER_TO[logits_dtype], _POINTER_TO[bias_dtype or torch.float32])
    parameters = (*inputs, "*int32", "*uint16", "*int16", "int32")
    built_for = f"topk_kernel {config!r} {logits_dtype} {bias_dtype} {writes_replay} {uses_pdl}"
    return NumbaKernel(function, parameters, WARPS_PER_BLOCK * WARP_SIZE, built_for)


def _load_width(num_experts: int) -> int:
    """Neighbours that a load may read at once: so many divide a row, and where a row begins is aligned to them (`expect`)."""
    width = min(slots_per_lane(num_experts), MAX_LOAD_WIDTH)
    while num_experts % width:
        width //= 2
    return width


_FLOAT_OF = {torch.float32: float_of_float32, torch.bfloat16: float_of_bfloat16}
_POINTER_TO = {torch.float32: "*float32", torch.bfloat16: "*uint16"}
