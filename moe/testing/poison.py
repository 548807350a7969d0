"""Memory that shows what is read before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

POISON = 1_000_000_007  # far out of every tensor's bounds


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, fresh allocations hold NaN, or an index far out of bounds."""
    with (
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
    ):
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(POISON if tensor.element_size() >= 4 else 0x5B)

    return allocate_poisoned
