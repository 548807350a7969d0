"""Programmatic dependent launches: a kernel starts while the one before it still runs, and waits for it itself.

Every kernel launched so waits (gdc_wait) before its first read of what another kernel wrote and before its first write,
and triggers its successor (gdc_launch_dependents) only after its own wait. So when a kernel starts, all but the one
kernel before it have completed, and what they wrote may be read before the wait.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def launches_dependents(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launches: compute capability 9.0 and up. True in emulation."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
