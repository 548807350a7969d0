"""Who does an exchange's local work: kernels on CUDA, the references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe.parallel import reference


@dataclass(frozen=True)
class LocalWork:
    """Each has its contract in `moe.parallel.reference`."""

    place_slots: Callable[..., Any]
    pack_slots: Callable[..., Any]
    sum_ranks: Callable[..., Any]
    plan_copies: Callable[..., Any]
    pack_rows: Callable[..., Any]
    number_slots: Callable[..., Any]


REFERENCES = LocalWork(
    reference.place_slots_reference,
    reference.pack_slots_reference,
    reference.sum_ranks_reference,
    reference.plan_copies_reference,
    reference.pack_rows_reference,
    reference.number_slots_reference,
)


def local_work(device: torch.device) -> LocalWork:
    return kernels() if device.type == "cuda" else REFERENCES


def kernels() -> LocalWork:
    """The kernels' host side; imported here, since a CPU needs no Triton."""
    from moe.parallel.number_slots import number_slots
    from moe.parallel.pack_rows import pack_rows
    from moe.parallel.pack_slots import pack_slots
    from moe.parallel.place_slots import place_slots
    from moe.parallel.plan_copies import plan_copies
    from moe.parallel.sum_ranks import sum_ranks

    return LocalWork(place_slots, pack_slots, sum_ranks, plan_copies, pack_rows, number_slots)
