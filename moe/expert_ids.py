"""Expert ids as callers hold them, in any integer type, -> the int32 that all stages take."""

from __future__ import annotations

import torch
from torch import Tensor

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


def as_int32_ids(ids: Tensor, num_experts: int) -> Tensor:
    """Ids of one of ID_DTYPES as int32, contiguous: those in [0, num_experts) as they are, others still out of it."""
    if ids.dtype in _WIDER_THAN_INT32:
        # Signed first: -1 as a bound would be the largest unsigned number. Clamped before it is cut: 2^32 would be expert 0.
        # A uint64 of 2^63 or more becomes negative, and is no expert either.
        ids = ids.to(torch.int64).clamp(-1, num_experts)
    return ids.to(torch.int32).contiguous()
