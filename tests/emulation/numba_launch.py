"""What lets numba kernels run in numba's simulator: Python in place of inline PTX and bit casts, and of the launcher.

Import it with NUMBA_ENABLE_CUDASIM=1 set, before any module of kernels.
"""

from __future__ import annotations

import emulation.warp_simulator as simulator
import numpy as np
import torch
from numba import cuda
from torch import Tensor

from moe.runtime import numba_warp_device
from moe.runtime.numba_launch import NumbaKernel

_NO_MEMORY = np.empty(0, dtype=np.uint8)


def float_of_bits(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


def bits_of_float(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


def computed(value: np.float32) -> np.float32:
    return value if value == value else float_of_bits(np.uint32(0x7FFFFFFF))


def one_or_more(word: np.uint32) -> np.uint32:
    return max(word, np.uint32(1))


def nearest_bfloat16(value: np.float32) -> np.uint32:
    bits = int(bits_of_float(value))
    lowest_kept = (bits >> 16) & 1
    return np.uint32((bits + 0x7FFF + lowest_kept) & 0xFFFF0000) if value == value else np.uint32(0x7FFF0000)


def warp_max(value: np.uint32) -> np.uint32:
    return max(simulator.meet_warp(value))


def warp_min(value: np.uint32) -> np.uint32:
    return min(simulator.meet_warp(value))


def warp_add(value: np.uint32) -> np.uint32:
    return np.uint32(sum(int(other) for other in simulator.meet_warp(value)) & 0xFFFFFFFF)


def load_two(pointer: np.ndarray, index: int) -> tuple[np.generic, ...]:
    return tuple(pointer[index : index + 2])


def load_four(pointer: np.ndarray, index: int) -> tuple[np.generic, ...]:
    return tuple(pointer[index : index + 4])


def load_word_of_gpu(pointer: np.ndarray, index: int) -> np.int32:
    return pointer[index]


def gdc_wait() -> None:
    pass


def gdc_launch_dependents() -> None:
    pass


for stand_in in (
    float_of_bits,
    bits_of_float,
    computed,
    nearest_bfloat16,
    one_or_more,
    warp_add,
    warp_max,
    warp_min,
    load_two,
    load_four,
    load_word_of_gpu,
    gdc_wait,
    gdc_launch_dependents,
):
    assert hasattr(numba_warp_device, stand_in.__name__)
    setattr(numba_warp_device, stand_in.__name__, stand_in)


def launch_simulated(
    kernel: NumbaKernel, num_blocks: int, *arguments: Tensor | int | None, uses_pdl: bool = False
) -> None:
    """Stands in for NumbaKernel.launch: runs the kernel over the memory of CPU tensors."""
    assert len(arguments) == len(kernel.parameters)
    simulated = cuda.jit(kernel.function)[num_blocks, kernel.threads_per_block]
    with np.errstate(all="ignore"):  # a GPU says nothing about NaN and infinities
        simulated(*(_as_parameter(name, argument) for name, argument in zip(kernel.parameters, arguments)))


def _as_parameter(name: str, argument: Tensor | int | None) -> np.ndarray | np.int32:
    if argument is None:
        return _NO_MEMORY
    if not isinstance(argument, Tensor):
        return np.int32(argument)
    flat = argument.detach().view(-1)
    memory = (flat.view(torch.uint16) if argument.dtype is torch.bfloat16 else flat).numpy()
    assert memory.dtype == name.removeprefix("*"), f"kernel wants {name}, got {argument.dtype}"
    return memory


NumbaKernel.launch = launch_simulated
