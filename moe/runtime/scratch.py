"""Memory that a call writes on its way: from torch's allocator, or within `scratch_from` from a buffer that the caller gave.

Stages ask for it by `new_scratch`. A buffer is used from its start in each call, so calls that share one run one after
another on a stream, as they do with memory that the allocator hands out again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 512  # of each tensor, as torch's allocator has it
_lock = threading.Lock()
_this_thread = threading.local()
_num_buffers = 0  # in use by any thread: where it is 0, as mostly, nothing else is looked at


class _Buffer:
    """How much of a buffer this call has taken."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.num_taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize
        for length in shape:
            size *= length
        first, self.num_taken = self.num_taken, self.num_taken + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self.num_taken > self.memory.numel():
            raise AssertionError(f"a call took {self.num_taken} bytes of a buffer of {self.memory.numel()}")
        return self.memory[first : first + size].view(dtype).view(shape)


def new_scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of this shape on `like`'s device, of `like`'s dtype if none is named."""
    if _num_buffers and (buffer := getattr(_this_thread, "buffer", None)) is not None:
        return buffer.take(shape, dtype or like.dtype)
    # Lengths one by one: torch reads them in two thirds of the time of a tuple of them.
    return like.new_empty(*shape) if dtype is None else like.new_empty(*shape, dtype=dtype)


def without_buffer(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with scratch from torch's allocator, within `scratch_from` too: for what a buffer's size does not count."""

    def run(*args: Any, **more: Any) -> Any:
        if not _num_buffers:
            return function(*args, **more)
        with scratch_from(None):
            return function(*args, **more)

    return run


@contextmanager
def scratch_from(memory: Tensor | None) -> Iterator[None]:
    """Within the block `new_scratch` hands out `memory`, [bytes] uint8, in this thread; None: what torch's allocator has."""
    global _num_buffers
    outer = getattr(_this_thread, "buffer", None)
    with _lock:
        _num_buffers += 1
    _this_thread.buffer = None if memory is None else _Buffer(memory)
    try:
        yield
    finally:
        _this_thread.buffer = outer
        with _lock:
            _num_buffers -= 1
