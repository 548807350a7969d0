"""Checks on tensors that callers hand in. A message says what was wanted, what came and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16  # widest load or store that a kernel issues


def expect(
    name: str,
    tensor: Tensor,
    shape: str,
    dims: dict[str, int],
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
    words: Mapping[str, str] | None = None,
) -> None:
    """Raise unless `tensor` has this shape, dtype and device, is contiguous and 16-byte aligned.

    Args:
        name: the argument's name, as the caller knows it.
        shape: axes separated by spaces, each a letter or word of `dims`, or a number: "T K", "E 2I H".
        dims: size of each letter. A letter that is missing is bound to the size that the tensor has,
            so one letter means one size for all checks that share `dims`.
        dtype: the dtype, or those allowed.
        device: where the tensor must lie; None accepts any.
        words: sentences that users of the original op know, put before the message: by axis letter for a wrong
            size, and under "rank", "dtype", "strides" for those.

    Raises:
        TypeError: not a tensor.
        ValueError: anything else, naming the tensor, what was wanted, what came and the cure.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; pass a tensor")
    known = words or {}
    axes = shape.split()
    if tensor.dim() != len(axes):
        raise ValueError(
            f"{_lead(known, 'rank')}{name}: expected {len(axes)}-D {_wanted(axes, dims)}, got {tensor.dim()}-D "
            f"{list(tensor.shape)}; reshape it"
        )
    for axis, size in zip(axes, tensor.shape):
        wanted = int(axis) if axis.isdigit() else dims.setdefault(axis, size)
        if size != wanted:
            raise ValueError(
                f"{_lead(known, axis)}{name}: expected {_wanted(axes, dims)}, got {list(tensor.shape)}; "
                "pass a tensor of that shape or change the config to match"
            )
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{_lead(known, 'dtype')}{name}: expected {' or '.join(map(_dtype_name, allowed))}, got "
            f"{_dtype_name(tensor.dtype)}; convert it with .to(torch.{_dtype_name(allowed[0])})"
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, got one on {tensor.device}; move it with .to({str(device)!r})"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{_lead(known, 'strides')}{name}: expected a contiguous tensor, got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}; call .contiguous() on it once, outside the hot path"
        )
    expect_aligned(name, tensor)


def is_as_expected(
    tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> bool:
    """Whether `expect` would let the tensor pass: the short way, for callers whose messages take time to make."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype is dtype
        and (device is None or tensor.device == device)
        and tensor.is_contiguous()
        and (not tensor.numel() or tensor.data_ptr() % ALIGNMENT_BYTES == 0)
    )


def expect_aligned(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor's memory starts at a multiple of 16 bytes."""
    if tensor.numel() and tensor.data_ptr() % ALIGNMENT_BYTES:
        raise ValueError(
            f"{name}: expected memory aligned to {ALIGNMENT_BYTES} bytes, got an address "
            f"{tensor.data_ptr() % ALIGNMENT_BYTES} bytes past one (a slice or a view at an odd offset); call .clone() on it"
        )


def expect_separate(name: str, written: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError where memory that will be written overlaps a tensor that will be read."""
    for other_name, other in others.items():
        if other is not None and _overlap(written, other):
            raise ValueError(
                f"{name}: expected memory of its own, got a tensor that shares memory with {other_name}; "
                "pass a separate tensor"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    return a.data_ptr() < b.data_ptr() + _span_bytes(b) and b.data_ptr() < a.data_ptr() + _span_bytes(a)


def _span_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _lead(words: Mapping[str, str], kind: str) -> str:
    return f"{words[kind]} " if kind in words else ""


def _wanted(axes: Sequence[str], dims: dict[str, int]) -> str:
    return (
        "[" + ", ".join(f"{axis}={dims[axis]}" if axis in dims and not axis.isdigit() else axis for axis in axes) + "]"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
