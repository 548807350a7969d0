"""Parameters of an activation that all experts share, as the tensors by expert that kernels read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moe.flow import SwigluParams


def numbers_by_expert(
    alpha: float | None, beta: float | None, clamp_limit: float | None, num_experts: int, device: torch.device
) -> SwigluParams | None:
    """Each [E_local] float32, kept, unless a CUDA graph is captured: it would own the memory. None where there is no number."""
    if alpha is None and beta is None and clamp_limit is None:
        return None
    return SwigluParams(*(_by_expert(value, num_experts, device) for value in (alpha, beta, clamp_limit)))


def _by_expert(value: float | None, num_experts: int, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _filled.__wrapped__(value, num_experts, device)
    return _filled(value, num_experts, device)


@cache
def _filled(value: float, num_experts: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be read under any mode
        return torch.full((num_experts,), value, dtype=torch.float32, device=device)
