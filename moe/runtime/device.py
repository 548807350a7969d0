"""What a GPU is and has: asked here and nowhere else. On a CPU, which emulates one, the answers are an H200's."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

OLDEST_CAPABILITY = (8, 0)  # before it there are no bfloat16 tensor cores, nor a reduction over the lanes of a warp

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


def why_no_kernels(device: torch.device) -> str | None:
    """Why none of our kernels can be compiled for a CUDA device; None where they can, as far as can be told here."""
    if torch.version.hip:
        return f"a ROCm build of torch ({torch.__version__})"
    if find_spec("triton") is None:
        return "a system without triton, which compiles them"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} of compute capability {capability[0]}.{capability[1]}"
    return None


def expect_kernels(device: torch.device) -> None:
    """Raise ValueError, before anything is compiled, for a CUDA device that our kernels do not run on."""
    reason = why_no_kernels(device)
    if reason is not None:
        raise ValueError(
            f"device: expected CUDA and a GPU of compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or newer, got "
            f"{reason}; the references run there, in plain torch: moe.reference_pipeline(config)"
        )


def current_stream(device: torch.device) -> int:
    """The handle of torch's current CUDA stream; 0 on a CPU (emulation)."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
