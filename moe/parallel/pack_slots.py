"""Ids and weights in one tensor, host side."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe.flow import TopK
from moe.parallel.pack_slots_kernel import pack_slots_kernel
from moe.runtime.triton_launch import TritonKernel

BLOCK = 256


def pack_slots(topk: TopK, num_rows: int) -> Tensor:
    """As `moe.parallel.reference.pack_slots_reference`, in one launch."""
    num_tokens, top_k = topk.expert_ids.shape
    packed = torch.empty(2, num_rows, top_k, dtype=torch.int32, device=topk.expert_ids.device)
    if num_rows:
        _kernel().launch(
            (-(-num_rows * top_k // BLOCK), 1, 1),
            packed,
            topk.expert_ids,
            topk.weights,
            numbers=(num_tokens * top_k, num_rows * top_k),
        )
    return packed


@functools.cache
def _kernel() -> TritonKernel:
    return TritonKernel(pack_slots_kernel, BLOCK=BLOCK, num_warps=4)
