"""Each slot's token times its weight, host side: for experts whose input is weighed and not their result."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from moe.flow import TopK, WeighedSlots
from moe.permute.config import PermuteConfig
from moe.permute.weigh_kernel import weigh_kernel
from moe.runtime.scratch import new_scratch
from moe.runtime.triton_launch import TritonKernel

COLUMNS_A_WARP = 256  # 16 bytes a lane
MAX_BLOCK_H = 1024


def weigh_tokens(hidden_states: Tensor, topk: TopK, *, config: PermuteConfig) -> WeighedSlots:
    """x[t * K + k] = bf16(weights[t, k] * hidden_states[t]), multiplied in float32, and weights of 1 in the place of those.

    Slots without a local expert are left out, so their weights may be NaN.

    Args:
        hidden_states: [T, H] bf16.
        topk: expert_ids [T, K] int32; weights [T, K] bf16 or float32, used in the precision they have.
        config: which experts lie here.
    Returns:
        [T * K, H] bf16, rows of left-out slots uninitialised, and a TopK of the same ids with ones of the weights' dtype.
    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    """
    config.check_weighed(hidden_states, topk)
    return launch_weigh_tokens(hidden_states, topk, config=config)


def launch_weigh_tokens(hidden_states: Tensor, topk: TopK, *, config: PermuteConfig) -> WeighedSlots:
    """`weigh_tokens` of tensors that were checked. An ordinary launch, which a dependent one may follow."""
    num_slots, hidden_size = topk.expert_ids.numel(), hidden_states.shape[1]
    weighed = new_scratch(hidden_states, (num_slots, hidden_size))
    ones = new_scratch(topk.weights, topk.weights.shape)
    if num_slots:
        kernel, num_blocks = _kernel_of(config, hidden_size)
        tensors = (hidden_states, topk.expert_ids, topk.weights, weighed, ones)
        kernel.launch((num_slots * num_blocks, 1, 1), *tensors)
    return WeighedSlots(weighed, TopK(topk.expert_ids, ones))


@functools.cache
def _kernel_of(config: PermuteConfig, hidden_size: int) -> tuple[TritonKernel, int]:
    """The kernel, and into how many programs it cuts a row."""
    block_h = min(MAX_BLOCK_H, max(triton.next_power_of_2(hidden_size), COLUMNS_A_WARP))
    kernel = TritonKernel(
        weigh_kernel,
        first_expert=config.local_expert_offset,
        num_experts=config.num_local_experts,
        TOP_K=config.top_k,
        HIDDEN=hidden_size,
        BLOCK_H=block_h,
        num_warps=block_h // COLUMNS_A_WARP,
    )
    return kernel, -(-hidden_size // block_h)
