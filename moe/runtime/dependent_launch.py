"""Programmatic dependent launches: a kernel starts while the one before it still runs, and waits for it itself.

Every kernel launched so waits (gdc_wait) before its first read of what another kernel wrote and before its first write,
and triggers its successor (gdc_launch_dependents) only after its own wait; one that does not triggers it as its programs
end. So when a kernel starts, all but the one kernel before it have completed, and what they wrote may be read before the
wait.

The first of them follows a kernel that may be anyone's. An ordinary launch is fine: it began when all before it had ended.
So is a dependent one that waits somewhere, as it must where it reads what its predecessor wrote. One that never waits may
end before its predecessor does, and ours would then read too early.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def launches_dependents(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launches: compute capability 9.0 and up. True in emulation."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
