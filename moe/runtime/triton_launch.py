"""Launch of Triton kernels by the handle of what was compiled: for kernels that are started again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from moe.runtime import triton_versions
from moe.runtime.tensor_maps import Boxes, Tensors, maps_inside, with_descriptors
from moe.runtime.triton_versions import COMPILER_OPTIONS, Launcher

ALIGNMENT_BYTES = 16  # Triton compiles for pointers that are multiples of it, or for any
Grid = tuple[int, int, int]
_runtime = knobs.runtime


class TritonKernel:
    """A Triton kernel and all of its arguments but the first ones, which change from launch to launch.

    `kernel[grid](...)` takes 13 us of host time to find what it compiled for such arguments, and to ask the driver about each
    pointer; by a kept handle a launch takes 5 us. Each combination of device, dtypes, absent tensors and 16-byte alignments
    goes through `kernel[grid](...)` once, which compiles it. So does every launch in Triton's interpreter, on tensors that
    are not on a GPU, while a hook on launches is installed (`triton.knobs.runtime`, profilers), and with a Triton that is not known.
    What `triton.knobs` say
    to the compiler is read at the first launch.

    With two or three TensorDescriptors `kernel[grid](...)` takes 40 us. Here the tensor maps that the launcher makes of them are
    kept too: a map says where memory lies and how it is cut, so it holds for every tensor of that address and shape.

    Args:
        kernel: what `triton.jit` or `gluon.jit` returned.
        fixed: by name, all parameters after the changing ones, and options such as num_warps and launch_pdl.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        self.kernel = kernel
        self.fixed = fixed
        self._kept: dict[tuple[Any, ...], _Handle] = {}

    def launch(self, grid: Grid, *tensors: Tensor | Boxes | None, numbers: tuple[int, ...] = ()) -> None:
        """Start the kernel on the current stream of the tensors' device.

        Args:
            grid: programs along the three axes.
            tensors: the kernel's first parameters, in order; the first one is not None, others may be. That all lie on
                one device is for the caller to check.
            numbers: the parameters after those, where they change from launch to launch too.
        """
        device_index = tensors[0].get_device()  # type: ignore[union-attr]
        if device_index < 0:  # the CPU: Triton's interpreter
            try:
                self._launch_normally(grid, tensors, numbers)
            except RuntimeError as error:
                if "active drivers" not in str(error):
                    raise
                raise ValueError(
                    f"kernel arguments: expected tensors on one CUDA device, got {tensors[0].device}; "  # type: ignore[union-attr]
                    "use the reference on a CPU"
                ) from error
        elif device_index == torch._C._cuda_getDevice():
            self._launch_on(device_index, grid, tensors, numbers)
        else:
            with torch.cuda.device(device_index):
                self._launch_on(device_index, grid, tensors, numbers)

    def _launch_normally(self, grid: Grid, tensors: Tensors, numbers: tuple[int, ...]) -> Any:
        arguments = [tensor.descriptor() if type(tensor) is Boxes else tensor for tensor in tensors]
        return self.kernel[grid](*arguments, *numbers, **COMPILER_OPTIONS, **self.fixed)

    def _launch_on(self, device_index: int, grid: Grid, tensors: Tensors, numbers: tuple[int, ...]) -> None:
        # One loop: what this takes is a third of the host's time for a launch.
        key: list[Any] = [device_index]
        pointers: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                pointers.append(None)
                continue
            if type(tensor) is Boxes:
                key.append(tensor.box)
                pointer = tensor.data_ptr()
                tensor = tensor.tensor
            else:
                pointer = tensor.data_ptr()
            bits |= pointer
            key.append(tensor.dtype)
            pointers.append(pointer)
        for number in numbers:
            key.append(_kind_of_number(number))
        if bits % ALIGNMENT_BYTES:
            key += [bool(pointer and pointer % ALIGNMENT_BYTES) for pointer in pointers]
        handle = self._kept.get(tuple(key))
        if _is_hooked(self.kernel):
            self._launch_normally(grid, tensors, numbers)
        elif handle is None:
            self._keep(tuple(key), self._launch_normally(grid, tensors, numbers), tensors, len(numbers))
        else:
            stream = torch._C._cuda_getCurrentRawStream(device_index)
            passed = pointers if handle.passed is None else handle.passed(tensors, pointers)
            handle.start(*grid, stream, *handle.leading, *passed, *numbers, *handle.constants)

    def _keep(self, key: tuple[Any, ...], compiled: Any, tensors: Tensors, num_numbers: int) -> None:
        """Keep what the launcher takes, where this release of Triton is known: run, function and packed_metadata."""
        launcher = triton_versions.launcher()
        if launcher is None:
            return
        names = getattr(self.kernel, "arg_names", ())[len(tensors) + num_numbers :]
        run, function, packed_metadata = (
            getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")
        )
        if None not in (run, function, packed_metadata) and all(name in self.fixed for name in names):
            constants = tuple(self.fixed[name] for name in names)
            num_boxes = sum(type(tensor) is Boxes for tensor in tensors)
            handle = _handle_of(launcher, run, function, packed_metadata, constants, num_boxes)
            self._kept[key] = handle._replace(compiled=compiled)


class _Handle(NamedTuple):
    """How a compiled kernel is started: start(*grid, stream, *leading, *changing arguments, *constants)."""

    start: Callable[..., Any]
    leading: tuple[Any, ...]
    constants: tuple[Any, ...]
    passed: Callable[[Tensors, list[int | None]], list[Any]] | None = (
        None  # what `start` takes for tensors, if not pointers
    )
    # Kept alive: from 3.8 on Triton unloads the code of what it compiled when nothing holds it, and where two threads compile the
    # same kernel at once, its own cache holds one of the two.
    compiled: Any = None


def _handle_of(
    launcher: Launcher, run: Any, function: Any, packed_metadata: Any, constants: tuple[Any, ...], num_boxes: int
) -> _Handle:
    """By what `run` calls, where `run` does no more than look for scratch memory; else by `run`."""
    passed = with_descriptors if num_boxes else None
    if not _does_nothing_else(run):
        return _Handle(run, (function, packed_metadata, None, None, None), constants, passed)
    start = run.launch
    if num_boxes and (found := maps_inside(start, num_boxes, launcher.map_maker)) is not None:
        start, maps = found
        passed = maps.passed
    leading = launcher.leading(run, function, packed_metadata)
    if launcher.takes_tuple:
        return _Handle(_with_one_argument(start, leading), (), constants, passed)
    return _Handle(start, leading, constants, passed)


def _does_nothing_else(run: Any) -> bool:
    """Whether `run` is the launcher that is known, without memory to allocate and without a sanitizer's arguments."""
    return type(run).__name__ == "CudaLauncher" and not (
        run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
    )


def _with_one_argument(launch: Callable[..., Any], leading: tuple[Any, ...]) -> Callable[..., Any]:
    """For a launcher that takes the kernel's arguments as one."""

    def start(x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        launch(x, y, z, stream, *leading, arguments)

    return start


def _is_hooked(kernel: Any) -> bool:
    """Whether a hook does anything: knobs hold a chain of calls, which may be empty, or what a user put in its place."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)


def _kind_of_number(number: int) -> tuple[Any, ...]:
    """What Triton may compile a kernel for: the type of an int, whether it is 1, and whether it is a multiple of 16."""
    return type(number), number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31, number < 1 << 63
