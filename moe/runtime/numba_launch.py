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

from moe.runtime.ptx_cache import cached_ptx, is_cached

# Blocks that a multiprocessor must hold. Told nothing, a large block may find too few registers; told the threads of a block
# alone, the compiler of driver 580 keeps to 32 registers where ptxas takes 48, and routing takes longer (docs/measured_facts.md).
LEAST_BLOCKS = 1
# What the extra cuda13 holds, by the names that any index knows.
_INSTALL = 'pip install "numba-cuda[cu13]"'
_compile_lock = threading.Lock()
_this_thread = threading.local()


@dataclass(frozen=True, eq=False)
class NumbaKernel:
    """A Python function in numba's CUDA dialect, and how it is called.

    numba compiles the function to PTX and cuda.core loads and launches it: 5 us a launch, where numba's own dispatcher
    takes 78 to 136 us. numba makes no CUDA context.
    """

    function: Callable[..., None]
    parameters: tuple[str, ...]  # numba type names, "*" before a pointer: ("*float32", "*uint16", "int32")
    threads_per_block: int
    built_for: str | None = None  # tells the function from others that this package builds; None: keep no PTX on disk
    _loaded_of_device: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    _loaded_of_capability: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False)

    def launch(self, num_blocks: int, *arguments: Tensor | int | None, uses_pdl: bool = False) -> None:
        """Start the kernel on the current stream of the tensors' device.

        The first launch on an architecture compiles, which a graph capture does not allow: warm up before.

        Args:
            num_blocks: blocks of the grid, at least 1.
            arguments: one for each parameter: for a pointer a tensor, or None for a null pointer; else a number.
            uses_pdl: may start while the kernel before it runs, for which the kernel waits itself (`moe.runtime.dependent_launch`).
                An ordinary launch where cuda-core has no dependent ones.
        Raises:
            ValueError: the tensors do not lie on one CUDA device.
            ImportError: numba-cuda, cuda-core, libNVVM or NVRTC is missing.
            RuntimeError: the driver cannot load what the compiler made.
        """
        index, values = _parameters(arguments)
        if index == torch._C._cuda_getDevice():
            self._launch_on(index, num_blocks, values, uses_pdl)
        else:
            with torch.cuda.device(index):
                self._launch_on(index, num_blocks, values, uses_pdl)

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
                launch_bounds=(self.threads_per_block, LEAST_BLOCKS),
            )
        except not_found as error:
            raise ImportError(f"libNVVM or NVRTC, which compile the numba kernels, is missing; {_INSTALL}") from error
        return ptx.decode() if isinstance(ptx, bytes) else ptx

    def cached_ptx(self, capability: tuple[int, int]) -> str:
        """What `compile_ptx` returns, from disk if it lies there, and left there if not (`moe.runtime.ptx_cache`)."""
        make = functools.partial(self.compile_ptx, capability)
        return make() if self.built_for is None else cached_ptx(self._kept_name(capability), make)

    def is_cached(self, capability: tuple[int, int]) -> bool:
        """Whether `cached_ptx` compiles nothing."""
        return self.built_for is not None and is_cached(self._kept_name(capability))

    def _kept_name(self, capability: tuple[int, int]) -> str:
        return f"{self.built_for} {self.parameters} {self.threads_per_block} {capability}"

    def _launch_on(self, device_index: int, num_blocks: int, values: list[Any], uses_pdl: bool) -> None:
        if not hasattr(_this_thread, "has_context"):
            _give_thread_a_context(device_index)
        kernel = self._loaded_of_device.get(device_index) or self._load(device_index)
        stream = _stream(device_index, torch._C._cuda_getCurrentRawStream(device_index))
        _launch()(stream, _launch_config(num_blocks, self.threads_per_block, uses_pdl), kernel, *values)

    def _load(self, device_index: int) -> Any:
        capability = torch.cuda.get_device_capability(device_index)
        with _compile_lock:
            kernel = self._loaded_of_capability.get(capability)
            if kernel is None:
                kernel = _loaded(self.cached_ptx(capability))
                self._loaded_of_capability[capability] = kernel
            self._loaded_of_device[device_index] = kernel
        return kernel


def _parameters(arguments: tuple[Tensor | int | None, ...]) -> tuple[int, list[Any]]:
    """The tensors' device, and what cuda.core passes on: a Python int is an address, a numpy scalar is itself."""
    index: int | None = None
    is_one = True
    values: list[Any] = []
    for argument in arguments:
        if argument is None:
            values.append(0)
        elif isinstance(argument, Tensor):
            other = argument.get_device()  # -1 is the CPU
            if other != index:
                is_one &= index is None and other >= 0
                index = other
            values.append(argument.data_ptr())
        else:
            values.append(_int32(argument))
    if index is None or not is_one:
        devices = sorted({str(argument.device) for argument in arguments if isinstance(argument, Tensor)})
        raise ValueError(
            f"kernel arguments: expected tensors on one CUDA device, got {' and '.join(devices)}; "
            "use the reference on a CPU"
        )
    return index, values


_int32 = functools.lru_cache(maxsize=4096)(
    np.int32
)  # a call's numbers come again; found, one takes a third of the time


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


def _give_thread_a_context(device_index: int) -> None:
    """What a launch needs: torch gives it to a thread only where it calls the CUDA runtime, which allocations may not."""
    _launch()  # says what to install where cuda-core is missing
    from cuda.bindings import driver
    from cuda.core import Device

    _, context = driver.cuCtxGetCurrent()
    if context is None or not int(context):
        Device(device_index).set_current()
    _this_thread.has_context = True


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
def _launch_config(num_blocks: int, threads_per_block: int, uses_pdl: bool) -> Any:
    from cuda.core import LaunchConfig

    has_pdl = hasattr(LaunchConfig, "programmatic_stream_serialization")
    options = {"programmatic_stream_serialization": True} if uses_pdl and has_pdl else {}
    return LaunchConfig(grid=num_blocks, block=threads_per_block, **options)
