"""What a GPU is and has: asked here and nowhere else. On a CPU, which emulates one, the answers are an H200's."""

from __future__ import annotations

import functools

import torch

HOPPER_SHARED_BYTES = 232448  # what a block may ask for on sm_90 and sm_100; taken where no GPU can be asked
HOPPER_SMS = 132


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for on `device`; a Hopper's where `device` is a CPU (emulation)."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of `device`; an H200's where it is a CPU (emulation)."""
    if device.type != "cuda":
        return HOPPER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and _has_hopper(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _has_hopper(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) == (9, 0)


def current_stream(device: torch.device) -> int:
    """The handle of torch's current CUDA stream; 0 on a CPU (emulation)."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
