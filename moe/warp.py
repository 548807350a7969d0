"""Warp intrinsics and inline PTX."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import extending
from numba.cuda import types as numba_types

WARP_SIZE = 32
FULL_MASK = 0xFFFFFFFF

intrinsic: Any = extending.intrinsic
types: Any = numba_types

# Inlined before typing, so that numba needs no device, and makes no context, to compile a caller.
device_function = cuda.jit(device=True, inline="always")


@device_function
def lane_in_warp() -> np.int32:
    return np.int32(cuda.threadIdx.x & (WARP_SIZE - 1))  # type: ignore[operator]


@device_function
def warp_in_grid() -> np.int64:
    warps_per_block = cuda.blockDim.x // WARP_SIZE  # type: ignore[operator]
    return np.int64(cuda.blockIdx.x) * warps_per_block + (cuda.threadIdx.x // WARP_SIZE)  # type: ignore[arg-type, operator]


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """uint32 -> the float32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """float32 -> its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _reduction(instruction: str) -> Any:
    """One instruction, of sm_80 and later, in place of five shuffles and compares."""

    @intrinsic
    def reduce(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = ir.IntType(32)
            assembly = ir.InlineAsm(
                ir.FunctionType(word, [word]),
                f"{instruction} $0, $1, {FULL_MASK:#x};",
                "=r,r",
                side_effect=True,  # never moved into a branch that only some lanes take
            )
            return builder.call(assembly, [arguments[0]])

        return types.uint32(types.uint32), generate

    return reduce


warp_max = _reduction("redux.sync.max.u32")  # uint32 of each lane -> the largest, in all lanes
warp_min = _reduction("redux.sync.min.u32")  # uint32 of each lane -> the smallest, in all lanes


@device_function
def warp_sum(value: np.float32) -> np.float32:
    """float32 of each lane -> their sum, the same bits in all lanes."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL_MASK, value, distance)
    return value


@device_function
def warp_first(value: np.float32) -> np.float32:
    """float32 of each lane -> that of lane 0, in all lanes."""
    return cuda.shfl_sync(FULL_MASK, value, 0)
