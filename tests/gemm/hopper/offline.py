"""What the offline compiles of both families of Hopper GEMMs must show, and inputs for them."""

from __future__ import annotations

import torch
from emulation.offline_driver import Launch
from torch import Tensor

NUM_SMS = 132


def empty(*shape: int) -> Tensor:
    """bf16 with an address, which a map for TMA asks for."""
    return torch.empty(shape, dtype=torch.bfloat16)


def assert_overlaps_without_spills(launch: Launch) -> None:
    """No spills, shared memory that fits, and wgmma that ptxas does not serialise."""
    assert launch.report.spill_bytes == 0
    assert launch.report.fits
    assert launch.report.performance_warnings == []
