#!/usr/bin/env bash
# numba-cuda 0.30.4 (numba 0.68.1, numpy 2.3.5, libNVVM 13.0.88), compiled for compute capability 9.0 without a GPU, and the
# CUDA simulator. One expects the types of C, or at least the same ones in both. Compiled, int32 * int32 is int64
# (mul.wide) and uint32 - 1 is int64, -1 of 0; simulated, the scalars are NumPy's, which wrap at 32 bits: the simulator
# gives 0 where the GPU's code gives 2^32. So does a field grow: a NamedTuple that a loop makes anew with `row + 1` does not
# compile, since its int32 field became int64, and it takes int32(row + 1).
# Output: numba-cuda 0.30.4: compiled, int32 * int32 is int64 by mul.wide.s32, uint32 - 1 is int64
#         a loop's NamedTuple with row + 1: TypingError, with int32(row + 1): int32
#         simulated, 65536 * 65536 is 0, 0 - 1 is 4294967295
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check \
  numba-cuda==0.30.4 numba==0.68.1 numpy==2.3.5 \
  cuda-bindings==13.5.0 cuda-core==1.2.2 nvidia-nvvm==13.0.88 nvidia-cuda-nvrtc==13.0.88
cat > "$folder/kernels.py" <<'E'
from typing import NamedTuple

from numba import cuda, int32


class Place(NamedTuple):
    row: int
    column: int


def square(values, out):
    i = cuda.threadIdx.x
    out[i] = values[i] * values[i]


def before(values, out):
    i = cuda.threadIdx.x
    out[i] = values[i] - 1


def next_row(row, steps):
    place = Place(row, row)
    for _ in range(steps):
        place = Place(place.row + 1, place.column)
    return place.row


def next_row_cast(row, steps):
    place = Place(row, row)
    for _ in range(steps):
        place = Place(int32(place.row + 1), place.column)
    return place.row
E
cat > "$folder/compiled.py" <<'E'
import re

import numba_cuda
from kernels import next_row, next_row_cast, square
from numba import cuda, int32, int64, uint32


def result_type(function, *types):
    return str(cuda.compile_ptx(function, types, cc=(9, 0), device=True)[1])


def result_type_or_error(function):
    try:
        return result_type(function, int32, int32)
    except Exception as error:
        assert "Cannot unify" in str(error), error
        return type(error).__name__


ptx, _ = cuda.compile_ptx(square, (int32[::1], int64[::1]), cc=(9, 0))
product = re.findall(r"mul\.wide\.s32(?=\s+%rd\d+, (%r\d+), \1;)", ptx)
types = result_type(lambda a, b: a * b, int32, int32), result_type(lambda a: a - 1, uint32)
fields = [result_type_or_error(function) for function in (next_row, next_row_cast)]
print(
    f"numba-cuda {numba_cuda.__version__}: compiled, int32 * int32 is {types[0]} by "
    f"{'mul.wide.s32' if product else 'no mul.wide.s32'}, uint32 - 1 is {types[1]}"
)
print(f"a loop's NamedTuple with row + 1: {fields[0]}, with int32(row + 1): {fields[1]}")
assert types == ("int64", "int64") and product, (types, ptx)
assert fields == ["TypingError", "int32"], fields
E
cat > "$folder/simulated.py" <<'E'
import numpy as np
from kernels import before, square
from numba import cuda


def first(kernel, values):
    out = np.zeros(1, np.int64)
    cuda.jit(kernel)[1, 1](values, out)
    return out[0].item()


seen = first(square, np.array([65536], np.int32)), first(before, np.array([0], np.uint32))
print(f"simulated, 65536 * 65536 is {seen[0]}, 0 - 1 is {seen[1]}")
assert seen == (0, 2**32 - 1), seen
E
"$folder/venv/bin/python" -W ignore "$folder/compiled.py"
NUMBA_ENABLE_CUDASIM=1 "$folder/venv/bin/python" -W ignore "$folder/simulated.py"
