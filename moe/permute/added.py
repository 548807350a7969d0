"""What finalize adds to a token's weighted rows: what its tensors must be, and how kernels are told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.base_config import LARGEST_FLOAT32
from moe.checks import as_float, expect, expect_type, is_as_expected
from moe.flow import Added

VALUE_DTYPES = (torch.bfloat16, torch.float32)


class AddedOperands(NamedTuple):
    """As kernels take it: two tensors that may be None, and a number that is compiled in, 1 where there is none."""

    values: Tensor | None
    gate: Tensor | None
    scale: float


NOTHING = AddedOperands(None, None, 1.0)


def as_added(added: Tensor | Added | None) -> Added | None:
    """A matrix alone counts once for each token.

    Raises:
        TypeError: none of the three.
    """
    if added is None or isinstance(added, Added):
        return added
    if isinstance(added, Tensor):
        return Added(added)
    raise TypeError(
        f"added: expected a torch.Tensor [T, H] or a moe.Added, got {type(added).__name__}; moe.Added(values, gate) makes one"
    )


def check_added(added: Added, num_tokens: int, hidden_size: int, device: torch.device) -> None:
    """Raise unless values are [T, H] and a gate is [T] or a finite number; bfloat16 or float32, on `device`."""
    expect_type("added", added, Added, "moe.Added(values, gate) makes one")
    values, gate = added.values, added.gate
    shape, dims = (num_tokens, hidden_size), {"T": num_tokens, "H": hidden_size}
    if not any(is_as_expected(values, shape, dtype, device) for dtype in VALUE_DTYPES):
        expect("added", values, "T H", dims, dtype=VALUE_DTYPES, device=device)
    if isinstance(gate, Tensor):
        expect("added.gate", gate, "T", dims, dtype=VALUE_DTYPES, device=device)
    elif gate is not None and not abs(as_float("added.gate", gate, "a tensor [T] or a number")) <= LARGEST_FLOAT32:
        raise ValueError(f"added.gate: expected a number that is finite in float32, got {gate}; leave it out for 1")


def tensors_of(added: Added | None) -> dict[str, Tensor | None]:
    """By the names that callers know."""
    if added is None:
        return {}
    return {"added": added.values, "added.gate": added.gate if isinstance(added.gate, Tensor) else None}


def operands_of(added: Added | None) -> AddedOperands:
    if added is None:
        return NOTHING
    gate = added.gate
    if isinstance(gate, Tensor):
        return AddedOperands(added.values, gate, 1.0)
    return AddedOperands(added.values, None, 1.0 if gate is None else float(gate))


def add_to(total: Tensor, added: Added | None) -> Tensor:
    """total [T, H] float32 and what is added to it, in float32: the references' last step."""
    if added is None:
        return total
    values, gate, scale = operands_of(added)
    assert values is not None
    addend = values.float()
    return total + (addend * scale if gate is None else gate.float()[:, None] * addend)
