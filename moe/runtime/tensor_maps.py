"""Tensors that a Gluon kernel copies box by box through the TMA unit, and the tensor maps that Triton's launcher makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from torch import Tensor

MAX_KEPT_MAPS = 4096  # of a compiled kernel; one takes half a kilobyte


@final
class Boxes(NamedTuple):
    """A tensor that a Gluon kernel copies box by box through the TMA unit: what becomes a TensorDescriptor."""

    tensor: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    layout: Any  # of a box in shared memory; follows from dtype and box
    first: int = 0  # element of the tensor's memory with which they begin: a view of it would take 2 us more

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() + (self.first and self.first * self.tensor.element_size())

    def get_device(self) -> int:
        return self.tensor.get_device()

    def descriptor(self) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        base = self.tensor.view(-1)[self.first :] if self.first else self.tensor
        return TensorDescriptor(base, list(self.shape), list(self.strides), list(self.box), self.layout)


Tensors = tuple[Tensor | Boxes | None, ...]


@dataclass(frozen=True, eq=False)
class TensorMaps:
    """What Triton's launcher makes of each Boxes of a compiled kernel, kept by address and shape: it reads nothing else."""

    make: Callable[[Any, Any], Sequence[Any]]  # of a TensorDescriptor and what the compiler says of it
    metadata: Sequence[Any]  # one a Boxes
    kept: dict[tuple[Any, ...], Sequence[Any]] = field(default_factory=dict)

    def passed(self, tensors: Tensors, pointers: list[int | None]) -> list[Any]:
        passed: list[Any] = []
        index = 0
        for tensor, pointer in zip(tensors, pointers):
            if type(tensor) is Boxes:
                key = index, pointer, tensor.shape, tensor.strides
                made = self.kept.get(key)
                passed += self._make(key, tensor) if made is None else made
                index += 1
            else:
                passed.append(pointer)
        return passed

    def _make(self, key: tuple[Any, ...], boxes: Boxes) -> Sequence[Any]:
        if len(self.kept) >= MAX_KEPT_MAPS:
            self.kept.clear()
        made = self.kept[key] = self.make(boxes.descriptor(), self.metadata[key[0]])
        return made


def maps_inside(
    launch: Any, num_boxes: int, map_maker: Callable[[inspect.ClosureVars], Callable[..., Sequence[Any]] | None]
) -> tuple[Callable[..., Any], TensorMaps] | None:
    """Triton wraps the launcher of a kernel with descriptors in a function that makes maps of them: the two that it calls."""
    if not inspect.isfunction(launch):
        return None
    outer = inspect.getclosurevars(launch)
    launcher, metadata = outer.nonlocals.get("launcher"), outer.nonlocals.get("tensordesc_meta")
    make = map_maker(outer)
    if launcher is None or make is None or not metadata or None in metadata or len(metadata) != num_boxes:
        return None
    return launcher, TensorMaps(make, metadata)


def with_descriptors(tensors: Tensors, pointers: list[int | None]) -> list[Any]:
    pairs = zip(tensors, pointers)
    return [tensor.descriptor() if type(tensor) is Boxes else pointer for tensor, pointer in pairs]
