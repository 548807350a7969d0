#!/usr/bin/env bash
# Triton 3.9.0 with torch 2.13.0: float32 to float8e4nv in the interpreter (TRITON_INTERPRET=1) and compiled for compute capability
# 9.0 without a GPU. One expects another order of sums from an interpreter, not another cast. Compiled, the cast is one
# instruction that rounds to nearest even and saturates at 448, as torch does. Interpreted, it overflows into the bits of the
# exponent, 500 becoming 256, rounds ties of normal numbers up and cuts subnormal ones off.
# Output: triton 3.9.0: 470, 500, 1.0625, 1.5 * 2^-9: interpreted [nan, 256.0, 1.125, 0.001953125], torch [448.0, 448.0, 1.0, 0.00390625], compiled by cvt.rn.satfinite.e4m3x2.f32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/triton" triton==3.9.0
cat > "$folder/kernel.py" <<'E'
import triton
import triton.language as tl


@triton.jit
def cast_kernel(values_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(values_ptr + offsets).to(tl.float8e4nv))
E
cat > "$folder/compiled.py" <<'E'
import re

import triton
from kernel import cast_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(cast_kernel, {"values_ptr": "*fp32", "out_ptr": "*fp8e4nv", "SIZE": "constexpr"}, {"SIZE": 128})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print(", ".join(sorted(set(re.findall(r"\bcvt\.[.\w]*e4m3[.\w]*", ptx)))))
E
cat > "$folder/interpreted.py" <<'E'
import math
import sys

import torch
import triton
from kernel import cast_kernel

values = torch.tensor([470, 500, 1.0625, 1.5 * 2**-9])
out = torch.zeros(4, dtype=torch.float8_e4m3fn)
cast_kernel[(1,)](values, out, 4)
interpreted, of_torch = out.float().tolist(), values.to(torch.float8_e4m3fn).float().tolist()
print(
    f"triton {triton.__version__}: 470, 500, 1.0625, 1.5 * 2^-9: interpreted {interpreted}, torch {of_torch}, "
    f"compiled by {sys.argv[1]}"
)
assert math.isnan(interpreted[0]) and interpreted[1:] == [256, 1.125, 2**-9], interpreted
assert of_torch == [448, 448, 1, 2**-8], of_torch
assert sys.argv[1] == "cvt.rn.satfinite.e4m3x2.f32", sys.argv[1]
E
export TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/triton"
compiled=$("$folder/venv/bin/python" -W ignore "$folder/compiled.py")
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/interpreted.py" "$compiled"
