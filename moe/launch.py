"""Launch of kernels written in numba: compiled once for each GPU architecture, started on torch's current stream."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INSTALL = 'pip install "moe-stages[cuda13]"'
_compile_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class NumbaKernel:
    """A Python function in numba's CUDA dialect, and how it is called.

    numba compiles the function to PTX and cuda.core loads and launches it: 5 us a launch, where numba's own dispatcher
    takes 78 to 136 us. numba makes no CUDA context.
    """

    function: Callable[..., None]
    parameters: tuple[str, ...]  # numba type names, "*" before a pointer: ("*float32", "*uint16", "int32")
    threads_per_block: int
    _loaded_of_device: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    _loaded_of_capability: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False)

    def launch(self, num_blocks: int, *arguments: Tensor | int | None) -> None:
        """Start the kernel on the current stream of the tensors' device.

        The first launch on an architecture compiles, which a graph capture does not allow: warm up before.

        Args:
            num_blocks: blocks of the grid, at least 1.
            arguments: one for each parameter: for a pointer a tensor, or None for a null pointer; else a number.
        Raises:
            ValueError: the tensors do not lie on one CUDA device.
            ImportError: numba-cuda, cuda-core, libNVVM or NVRTC is missing.
            RuntimeError: the driver cannot load what the compiler made.
        """
        index = _device_index(arguments)
        values = [_as_parameter(argument) for argument in arguments]
        with torch.cuda.device(index):
            kernel = self._loaded_of_device.get(index) or self._load(index)
            stream = _stream(index, torch._C._cuda_getCurrentRawStream(index))
            _launch()(stream, _launch_config(num_blocks, self.threads_per_block), kernel, *values)

    def compile_ptx(self, capability: tuple[int, int]) -> str:
        """PTX for a compute capability such as (9, 0). Needs libNVVM and NVRTC, but no GPU and no driver."""
        cuda, not_found = _compiler()
        numba_types = cuda.types
        signature = numba_types.void(*(_numba_type(numba_types, name) for name in self.parameters))
        try:
            ptx, _ = cuda.compile(
                self.function,
                signature,
                device=False,
                abi="numba",
                cc=capability,
                output="ptx",
                opt=True,
                launch_bounds=self.threads_per_block,  # else a large block may find too few registers
            )
        except not_found as error:
            raise ImportError(f"libNVVM or NVRTC, which compile the numba kernels, is missing; {_INSTALL}") from error
        return ptx.decode() if isinstance(ptx, bytes) else ptx

    def _load(self, device_index: int) -> Any:
        capability = torch.cuda.get_device_capability(device_index)
        with _compile_lock:
            kernel = self._loaded_of_capability.get(capability)
            if kernel is None:
                kernel = _loaded(self.compile_ptx(capability))
                self._loaded_of_capability[capability] = kernel
            self._loaded_of_device[device_index] = kernel
        return kernel


def _device_index(arguments: tuple[Tensor | int | None, ...]) -> int:
    indices = {argument.get_device() for argument in arguments if isinstance(argument, Tensor)}  # -1 is the CPU
    if len(indices) != 1 or -1 in indices:
        devices = sorted({str(argument.device) for argument in arguments if isinstance(argument, Tensor)})
        raise ValueError(
            f"kernel arguments: expected tensors on one CUDA device, got {' and '.join(devices)}; "
            "use the reference on a CPU"
        )
    return indices.pop()


def _as_parameter(argument: Tensor | int | None) -> Any:
    """What cuda.core passes on: a Python int is an address, a numpy scalar is itself."""
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else np.int32(argument)


def _numba_type(numba_types: Any, name: str) -> Any:
    return numba_types.CPointer(getattr(numba_types, name[1:])) if name[0] == "*" else getattr(numba_types, name)


def _compiler() -> tuple[Any, tuple[type[Exception], ...]]:
    """numba's CUDA module, and the exceptions that say that a compiler library is missing."""
    try:
        from cuda.pathfinder import DynamicLibNotFoundError
        from numba import cuda
        from numba.cuda.cudadrv.error import NvvmSupportError
    except ImportError as error:
        raise ImportError(
            f"numba-cuda, which compiles the routing and permutation kernels, is missing; {_INSTALL}"
        ) from error
    return cuda, (DynamicLibNotFoundError, NvvmSupportError)


@functools.cache
def _launch() -> Any:
    try:
        from cuda.core import launch
    except ImportError as error:
        raise ImportError(
            f"cuda-core, which launches the routing and permutation kernels, is missing; {_INSTALL}"
        ) from error
    return launch


def _loaded(ptx: str) -> Any:
    from cuda.core import ObjectCode

    name = ptx.split(".entry", 1)[1].split("(", 1)[0].strip()
    try:
        return ObjectCode.from_ptx(ptx.encode()).get_kernel(name)
    except Exception as error:
        version = ptx.split(".version", 1)[1].split(None, 1)[0]
        raise RuntimeError(
            f"the driver could not load a kernel of PTX version {version}: {error}. Where the driver is older than "
            f"libNVVM, install the libNVVM of the driver's CUDA version; for CUDA 13.0: {_INSTALL}"
        ) from error


@functools.lru_cache(maxsize=256)
def _stream(device_index: int, handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@functools.lru_cache(maxsize=4096)
def _launch_config(num_blocks: int, threads_per_block: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=num_blocks, block=threads_per_block)
