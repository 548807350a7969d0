"""Each slot's token times its weight, for experts whose input is weighed and not their result: two launches of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.flow import TopK, WeighedSlots
from moe.permute.config import PermuteConfig
from moe.runtime.scratch import new_scratch


def weigh_tokens(hidden_states: Tensor, topk: TopK, *, config: PermuteConfig) -> WeighedSlots:
    """x[t * K + k] = bf16(weights[t, k] * hidden_states[t]), multiplied in float32, and weights of 1 in the place of those.

    Args:
        hidden_states: [T, H] bf16.
        topk: expert_ids [T, K] int32; weights [T, K] bf16 or float32, used in the precision they have. Those of slots without a local
            expert may be NaN: no row of theirs is read.
        config: which experts lie here.
    Returns:
        [T * K, H] bf16, and a TopK of the same ids with ones of the weights' dtype.
    Raises:
        ValueError: naming the tensor, what was wanted and what came.
    """
    config.check_weighed(hidden_states, topk)
    return launch_weigh_tokens(hidden_states, topk, config=config)


def launch_weigh_tokens(hidden_states: Tensor, topk: TopK, *, config: PermuteConfig) -> WeighedSlots:
    """`weigh_tokens` of tensors that were checked. Ordinary launches, which a dependent one may follow."""
    num_tokens, hidden_size = hidden_states.shape
    weighed = new_scratch(hidden_states, (num_tokens, config.top_k, hidden_size))
    ones = new_scratch(topk.weights, topk.weights.shape)
    with torch.inference_mode():  # where a caller's workspace may have been allocated
        torch.mul(hidden_states[:, None], topk.weights[..., None], out=weighed)
        ones.fill_(1)
    return WeighedSlots(weighed.view(-1, hidden_size), TopK(topk.expert_ids, ones))
