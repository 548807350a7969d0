"""Warp intrinsics and inline PTX."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import extending
from numba.cuda import types as numba_types

WARP_SIZE = 32
_LOG_WARP_SIZE = 5  # a shift, where a signed division would take ten instructions
FULL_MASK = 0xFFFFFFFF

intrinsic: Any = extending.intrinsic
types: Any = numba_types

# Inlined before typing, so that numba needs no device, and makes no context, to compile a caller.
device_function = cuda.jit(device=True, inline="always")


@device_function
def lane_in_warp() -> np.int32:
    return np.int32(cuda.threadIdx.x & (WARP_SIZE - 1))  # type: ignore[operator]


@device_function
def warp_in_block() -> np.int32:
    return np.int32(cuda.threadIdx.x >> _LOG_WARP_SIZE)  # type: ignore[operator]


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


@intrinsic
def one_or_more(typing_context: Any, word: Any) -> Any:
    """max(word, 1) of a uint32: one instruction, where LLVM makes a comparison and a select of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        assembly = ir.InlineAsm(ir.FunctionType(number, [number]), "max.u32 $0, $1, 1;", "=r,r")
        return builder.call(assembly, [arguments[0]])

    return types.uint32(types.uint32), generate


@device_function
def computed(value: np.float32) -> np.float32:
    """The result of float32 arithmetic. Where it is NaN a GPU gives it the bits 0x7FFFFFFF; other machines keep an operand's.

    Source: CUDA C++ Programming Guide, floating-point standard.
    """
    return value


@intrinsic
def nearest_bfloat16(typing_context: Any, value: Any) -> Any:
    """float32 -> the bits of the nearest bfloat16 in the upper half of a uint32, ties to even; of a NaN any NaN. sm_80 and later."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        assembly = ir.InlineAsm(
            ir.FunctionType(word, [ir.FloatType()]),
            "{ .reg .b16 rounded, zero; mov.b16 zero, 0; cvt.rn.bf16.f32 rounded, $1; mov.b32 $0, {zero, rounded}; }",
            "=r,f",
        )
        return builder.call(assembly, [arguments[0]])

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
warp_add = _reduction("redux.sync.add.u32")  # uint32 of each lane -> their sum, in all lanes
warp_min = _reduction("redux.sync.min.u32")  # uint32 of each lane -> the smallest, in all lanes


def _instruction(instruction: str) -> Any:
    @intrinsic
    def issue(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            assembly = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), instruction, "~{memory}", side_effect=True)
            builder.call(assembly, [])
            return context.get_dummy_value()

        return types.void(), generate

    return issue


# Compute capability 9.0 and up: see moe.runtime.dependent_launch.
gdc_wait = _instruction("griddepcontrol.wait;")
gdc_launch_dependents = _instruction("griddepcontrol.launch_dependents;")


def _load(width: int) -> Any:
    """One load, of `width` neighbours, from an address that is a multiple of their size."""

    @intrinsic
    def load(typing_context: Any, pointer: Any, index: Any) -> Any:
        numbers = types.UniTuple(pointer.dtype, width)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = context.get_value_type(pointer.dtype)
            address = builder.bitcast(
                builder.gep(arguments[0], [arguments[1]]), ir.VectorType(number, width).as_pointer()
            )
            vector = builder.load(address, align=width * context.get_abi_sizeof(number))
            elements = [builder.extract_element(vector, ir.IntType(32)(element)) for element in range(width)]
            return context.make_tuple(builder, numbers, elements)

        return numbers(pointer, types.int64), generate

    return load


load_two = _load(2)  # pointer, index of the first -> tuple
load_four = _load(4)


@intrinsic
def load_word_of_gpu(typing_context: Any, pointer: Any, index: Any) -> Any:
    """pointer[index] of int32 as it is in the L2 cache, which all multiprocessors share: never an older one from L1. sm_70 and later."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        address = builder.ptrtoint(builder.gep(arguments[0], [arguments[1]]), ir.IntType(64))
        assembly = ir.InlineAsm(
            ir.FunctionType(word, [ir.IntType(64)]),
            "ld.relaxed.gpu.b32 $0, [$1];",
            "=r,l,~{memory}",
            side_effect=True,
        )
        return builder.call(assembly, [address])

    return types.int32(pointer, types.int64), generate


def build_sum_of_first(count: int) -> Any:
    """(float32 of each lane) -> the sum over the first `count` lanes, the same bits in each of them; the others bring 0."""
    STEPS = (count - 1).bit_length()

    @device_function
    def sum_of_first(value: np.float32) -> np.float32:
        for step in range(STEPS):
            value += cuda.shfl_xor_sync(FULL_MASK, value, 1 << (STEPS - 1 - step))
        return value

    return sum_of_first


@device_function
def warp_first(value: np.float32) -> np.float32:
    """float32 of each lane -> that of lane 0, in all lanes."""
    return cuda.shfl_sync(FULL_MASK, value, 0)


@device_function
def word_of_lane(word: np.uint32, lane: np.int32) -> np.uint32:
    """The uint32 that `lane` brought."""
    return bits_of_float(cuda.shfl_sync(FULL_MASK, float_of_bits(word), lane))


@device_function
def word_across(word: np.uint32, distance: int) -> np.uint32:
    """The uint32 that the lane brought whose number differs from this lane's by exclusive or with `distance`."""
    return bits_of_float(cuda.shfl_xor_sync(FULL_MASK, float_of_bits(word), distance))
