"""Checks on tensors that callers hand in. A message says what was wanted, what came and how to mend it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

WIDEST_LOAD_BYTES = 16  # that a kernel issues, and TMA's alignment
DEVICES_OF_KERNELS = (
    "cuda",
)  # elsewhere references run, which read memory wherever it begins: weights mapped from a file
# Numbers that mean something with their scales only. Which of them there are depends on torch's version.
_QUANTISED = ("float8", "float4", "int8", "uint8", "int4", "uint4", "int2", "uint2", "quint", "qint")


def no_case(choice: Any, where: str) -> ValueError:
    """What code raises that chooses by a value, and has no case for this one: it never takes it for another.

    Args:
        choice: a member of an enum, or a name.
        where: the file and what is chosen there, in which a case is missing.
    """
    is_number = isinstance(choice, Enum) and isinstance(choice, int)
    number = f" ({int(choice)})" if is_number else ""
    name = f"{type(choice).__name__}.{choice.name}{number}" if isinstance(choice, Enum) else repr(choice)
    return ValueError(f"{name}: expected one with a case in {where}, got one without; add it there, or choose another")


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
    """Raise unless `tensor` has this shape, dtype and device, is contiguous and aligned.

    Aligned: to 16 bytes, or to the power of two that divides a row of the last axis if that is less. So rows of an aligned
    tensor pass, whichever they are. On a CPU memory may begin anywhere.

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
    if not _fits(tensor, _axes(shape), dims, dtype, device):
        _refuse(name, tensor, shape.split(), dims, dtype, device, words or {})


def _fits(
    tensor: Tensor,
    axes: tuple[str | int, ...],
    dims: dict[str, int],
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None,
) -> bool:
    """What `expect` expects, told without a message."""
    if not isinstance(tensor, Tensor):
        return False
    sizes = tensor.shape
    if len(sizes) != len(axes):
        return False
    for axis, size in zip(axes, sizes):
        if size != (dims.setdefault(axis, size) if isinstance(axis, str) else axis):
            return False
    return (
        (tensor.dtype == dtype if isinstance(dtype, torch.dtype) else tensor.dtype in dtype)
        and (device is None or tensor.device == device)
        and tensor.is_contiguous()
        and (tensor.data_ptr() % WIDEST_LOAD_BYTES == 0 or _is_aligned(tensor))
    )


@functools.cache
def _axes(shape: str) -> tuple[str | int, ...]:
    return tuple(int(axis) if axis.isdigit() else axis for axis in shape.split())


def _refuse(
    name: str,
    tensor: Tensor,
    axes: Sequence[str],
    dims: dict[str, int],
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None,
    words: Mapping[str, str],
) -> None:
    """Raise what is wrong first."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; pass a tensor")
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in allowed:
        expect_no_scales(name, tensor, allowed, lead=_lead(words, "dtype"))
    if tensor.dim() != len(axes):
        raise ValueError(
            f"{_lead(words, 'rank')}{name}: expected {len(axes)}-D {_wanted(axes, dims)}, got {tensor.dim()}-D "
            f"{list(tensor.shape)}; reshape it"
        )
    for axis, size in zip(axes, tensor.shape):
        wanted = int(axis) if axis.isdigit() else dims.setdefault(axis, size)
        if size != wanted:
            raise ValueError(
                f"{_lead(words, axis)}{name}: expected {_wanted(axes, dims)}, got {list(tensor.shape)}; "
                "pass a tensor of that shape, or arguments or a config that match"
            )
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{_lead(words, 'dtype')}{name}: expected {' or '.join(map(_dtype_name, allowed))}, got "
            f"{_dtype_name(tensor.dtype)}; convert it with .to(torch.{_dtype_name(allowed[0])})"
            f"{UNLESS_PACKED if allowed[0].is_floating_point and is_integer(tensor.dtype) else ''}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, got one on {tensor.device}; move it with .to({str(device)!r})"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{_lead(words, 'strides')}{name}: expected a contiguous tensor, got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}; call .contiguous() on it once, outside the hot path"
        )
    if not _is_aligned(tensor):
        wanted = _alignment_bytes(tensor)
        raise ValueError(
            f"{name}: expected memory aligned to {wanted} bytes, got an address {tensor.data_ptr() % wanted} bytes past one "
            "(a slice or a view at an odd offset); call .clone() on it"
        )


UNLESS_PACKED = ", unless these are packed codes of quantised numbers: dequantise those with their scales"


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype stand for others, by scales that lie elsewhere."""
    return _dtype_name(dtype).startswith(_QUANTISED)


def expect_no_scales(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], *, lead: str = "") -> None:
    """Raise ValueError for a quantised tensor where floating numbers are wanted: .to() would leave its scales out."""
    if is_quantised(tensor.dtype) and any(dtype.is_floating_point for dtype in allowed):
        raise ValueError(
            f"{lead}{name}: expected {' or '.join(map(_dtype_name, allowed))}, got {_dtype_name(tensor.dtype)}, whose "
            "numbers are quantised; dequantise it with its scales, which a mere conversion would leave out"
        )


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
        and (tensor.data_ptr() % WIDEST_LOAD_BYTES == 0 or _is_aligned(tensor))
    )


def expect_type(name: str, value: object, kind: type, cure: str) -> None:
    """Raise TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}; {cure}")


def expect_count(name: str, value: int) -> None:
    """Raise unless `value` is an int of 1 or more: TypeError for another type, else ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}; pass a number of 1 or more")
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}; leave it out for the default")


def as_int(name: str, value: object) -> int:
    """`value` as an int: Python's and numpy's ints pass, and tensors on the CPU that hold one integer without an axis.

    A tensor is read here: cache by what this returns, not by what a caller passed.

    Raises:
        TypeError: anything else, bools and whole floats too.
    """
    plain = plain_number(value)
    if isinstance(plain, int) and not isinstance(plain, bool):
        return plain
    raise TypeError(f"{name}: expected an int, got {_kind_of(value)}; pass an int")


def as_float(name: str, value: object, wanted: str = "a float") -> float:
    """`value` as a float: Python's and numpy's ints and floats pass, and tensors on the CPU that hold one without an axis.

    Raises:
        TypeError: anything else, bools too.
    """
    plain = plain_number(value)
    if isinstance(plain, (int, float)) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError:  # an int of hundreds of digits
            return math.inf if plain > 0 else -math.inf
    raise TypeError(f"{name}: expected {wanted}, got {_kind_of(value)}; pass {wanted}")


def plain_number(value: Any) -> Any:
    """The Python number that a numpy scalar, or a tensor or array without an axis, holds; anything else as it is.

    So is a tensor on a GPU, which cannot be read without waiting for it.
    """
    if type(value) is int or getattr(value, "shape", None) != ():
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value
    return value.item()


def _kind_of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {_dtype_name(value.dtype)}, shape {list(value.shape)} on {value.device}"
    return type(value).__name__


def _is_aligned(tensor: Tensor) -> bool:
    return (
        tensor.device.type not in DEVICES_OF_KERNELS
        or not tensor.numel()
        or tensor.data_ptr() % _alignment_bytes(tensor) == 0
    )


def _alignment_bytes(tensor: Tensor) -> int:
    return math.gcd(WIDEST_LOAD_BYTES, tensor.shape[-1] * tensor.element_size())


def expect_separate(name: str, written: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError where memory that will be written overlaps a tensor that will be read."""
    start, num_bytes = written.data_ptr(), _span_bytes(written)
    if not num_bytes:
        return
    for other_name, other in others.items():
        if other is None:
            continue
        other_start = other.data_ptr()
        if start >= other_start + _span_bytes(other) or other_start >= start + num_bytes:
            continue
        if other.numel() and other.device == written.device:
            raise ValueError(
                f"{name}: expected memory of its own, got a tensor that shares memory with {other_name}; "
                "pass a separate tensor"
            )


def _span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
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
