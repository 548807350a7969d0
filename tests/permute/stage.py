"""A stage function of either implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Stage:
    """The function, and the device that it runs on."""

    run: Callable[..., Any]
    device: torch.device
