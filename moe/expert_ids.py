"""Expert ids as callers hold them, in any integer type, -> the int32 that all stages take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moe.runtime.device import why_no_kernels

ID_DTYPES = (
    torch.int32,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_WIDER_THAN_INT32 = (torch.int64, torch.uint32, torch.uint64)
BLOCK = 256  # ids a program: 32 tokens of 8 choices


def as_int32_ids(ids: Tensor, num_experts: int) -> Tensor:
    """Ids of one of ID_DTYPES as int32, contiguous: those in [0, num_experts) as they are, others still out of it."""
    if ids.dtype not in _WIDER_THAN_INT32:
        return ids.to(torch.int32).contiguous()
    if _is_for_kernel(ids):
        return launch_map_ids(ids.contiguous(), None, num_experts)
    # Signed first: -1 as a bound would be the largest unsigned number. Clamped before it is cut: 2^32 would be expert 0.
    # A uint64 of 2^63 or more becomes negative, and is no expert either.
    return ids.to(torch.int64).clamp(-1, num_experts).to(torch.int32).contiguous()


def mapped_ids(ids: Tensor, expert_map: Tensor) -> Tensor:
    """Each id's place in `expert_map` [E] int32 or int64; -1 for what is no id in [0, E): int32, contiguous, of the shape of ids."""
    num_experts = expert_map.shape[0]
    if _is_for_kernel(ids):
        return launch_map_ids(ids.contiguous(), expert_map.contiguous(), num_experts)
    wide = ids.to(torch.int64)  # torch has no clamp of unsigned numbers, and takes those of 8 bits for a mask
    known = wide.clamp(0, num_experts - 1)
    return torch.where(known == wide, expert_map[known], -1).to(torch.int32)


def launch_map_ids(ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    """Both of contiguous tensors, in one launch where torch takes two to five."""
    mapped = ids.new_empty(ids.shape, dtype=torch.int32)
    if ids.numel():
        numbers = (ids.numel(), num_experts)
        _kernel().launch((-(-ids.numel() // BLOCK), 1, 1), ids, expert_map, mapped, numbers=numbers)
    return mapped


def _is_for_kernel(ids: Tensor) -> bool:
    """On a GPU, and of memory that a kernel can read: what is traced is left to torch."""
    return ids.is_cuda and type(ids) is Tensor and not torch.compiler.is_compiling() and _has_kernels(ids.device)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return why_no_kernels(device) is None


@functools.cache
def _kernel() -> Any:
    from moe.expert_ids_kernel import map_ids_kernel
    from moe.runtime.triton_launch import TritonKernel

    return TritonKernel(map_ids_kernel, BLOCK=BLOCK, num_warps=4)
