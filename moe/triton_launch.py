"""Launch of Triton kernels by the handle of what was compiled: for kernels that are started again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

ALIGNMENT_BYTES = 16  # Triton compiles for pointers that are multiples of it, or for any
Grid = tuple[int, int, int]
_TRITON_RELEASE = triton.__version__.rpartition(".")[0]  # "3.6"
_runtime = knobs.runtime


class KeptKernel:
    """A Triton kernel and all of its arguments but the first ones, which change from launch to launch.

    `kernel[grid](...)` takes 13 us of host time to find what it compiled for such arguments, and to ask the driver about each
    pointer; by a kept handle a launch takes 5 us. Each combination of device, dtypes and absent tensors goes through
    `kernel[grid](...)` once, which compiles it. So does every launch in Triton's interpreter, on tensors that are not on a
    GPU, with a pointer that is not 16-byte aligned, and while a hook on launches is installed (`triton.knobs.runtime`,
    profilers). What `triton.knobs` say to the compiler is read at the first launch.

    Not for kernels that take TensorDescriptors.

    Args:
        kernel: what `triton.jit` or `gluon.jit` returned.
        fixed: by name, all parameters after the changing ones, and options such as num_warps and launch_pdl.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        self.kernel = kernel
        self.fixed = fixed
        self._kept: dict[tuple[Any, ...], _Handle] = {}

    def launch(self, grid: Grid, *tensors: Tensor | None, numbers: tuple[int, ...] = ()) -> None:
        """Start the kernel on the current stream of the tensors' device.

        Args:
            grid: programs along the three axes.
            tensors: the kernel's first parameters, in order; the first one is a tensor, others may be None. That all lie on
                one device is for the caller to check.
            numbers: the parameters after those, where they change from launch to launch too.
        """
        device_index = tensors[0].get_device()  # type: ignore[union-attr]  # -1 is the CPU
        if device_index < 0:
            self.kernel[grid](*tensors, *numbers, **self.fixed)
        elif device_index == torch._C._cuda_getDevice():
            self._launch_on(device_index, grid, tensors, numbers)
        else:
            with torch.cuda.device(device_index):
                self._launch_on(device_index, grid, tensors, numbers)

    def _launch_on(
        self, device_index: int, grid: Grid, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]
    ) -> None:
        key: list[Any] = [device_index]
        pointers: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                key.append(tensor.dtype)
                pointers.append(pointer)
        for number in numbers:
            key.append(_kind_of_number(number))
        handle = self._kept.get(tuple(key))
        if bits % ALIGNMENT_BYTES or _is_hooked(self.kernel):
            self.kernel[grid](*tensors, *numbers, **self.fixed)
        elif handle is None:
            self._keep(tuple(key), self.kernel[grid](*tensors, *numbers, **self.fixed), len(tensors) + len(numbers))
        else:
            stream = torch._C._cuda_getCurrentRawStream(device_index)
            handle.start(*grid, stream, *handle.leading, *pointers, *numbers, *handle.constants)

    def _keep(self, key: tuple[Any, ...], compiled: Any, num_arguments: int) -> None:
        """Keep what the launcher takes, where this release of Triton has it: run, function and packed_metadata."""
        names = getattr(self.kernel, "arg_names", ())[num_arguments:]
        run, function, packed_metadata = (
            getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")
        )
        if None not in (run, function, packed_metadata) and all(name in self.fixed for name in names):
            self._kept[key] = _handle_of(run, function, packed_metadata, tuple(self.fixed[name] for name in names))


class _Handle(NamedTuple):
    """How a compiled kernel is started: start(*grid, stream, *leading, *changing arguments, *constants)."""

    start: Callable[..., Any]
    leading: tuple[Any, ...]
    constants: tuple[Any, ...]


def _handle_of(run: Any, function: Any, packed_metadata: Any, constants: tuple[Any, ...]) -> _Handle:
    """By `run`, which takes any release's kernels; where that does no more than look for scratch memory, by what it calls."""
    hooks = (None, None, None)  # none to call, and no metadata for them
    is_known = _TRITON_RELEASE == "3.6" and type(run).__name__ == "CudaLauncher"
    if is_known and not run.global_scratch_size and not run.profile_scratch_size:
        leading = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed_metadata, *hooks)
        return _Handle(run.launch, leading, constants)
    return _Handle(run, (function, packed_metadata, *hooks), constants)


def _is_hooked(kernel: Any) -> bool:
    """Whether a hook does anything: knobs hold a chain of calls, which may be empty, or what a user put in its place."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)


def _kind_of_number(number: int) -> tuple[Any, ...]:
    """What Triton may compile a kernel for: the type of an int, whether it is 1, and whether it is a multiple of 16."""
    return type(number), number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31, number < 1 << 63
