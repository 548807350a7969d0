"""Stages 2 and 5 by either implementation, on memory that was never clean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference

POISON = 1_000_000_007


@dataclass(frozen=True)
class Stages:
    """The two functions, and the device that they run on."""

    plan_permutation: Callable[..., Any]
    finalize_tokens: Callable[..., Any]
    device: torch.device


@pytest.fixture(params=["reference", pytest.param("kernel", marks=[pytest.mark.interpreter, pytest.mark.gpu])])
def stages(request: pytest.FixtureRequest) -> Stages:
    if request.param == "reference":
        return Stages(plan_permutation_reference, finalize_tokens_reference, torch.device("cpu"))
    from moe.permute.finalize import finalize_tokens
    from moe.permute.plan import plan_permutation

    return Stages(plan_permutation, finalize_tokens, request.getfixturevalue("triton_device"))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return garbage: NaN, or an index far out of bounds."""
    empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
