#!/usr/bin/env bash
# Triton 3.7.1, 3.8.0 and 3.9.0 with torch 2.13.0, in the interpreter (TRITON_INTERPRET=1), int32 and float32; the histogram
# also compiled for compute capability 9.0 without a GPU.
# The same kernel and input, other answers by release, none of them with a word.
#   tl.histogram(ids, 4) of ids that mark absent experts by 4: 3.7.1 and 3.8.0 count them as 3, for the last bin of NumPy's
#   histogram takes its upper edge too; 3.9.0 leaves them out. Compiled code compares ids with the number of bins
#   from 3.8.0 on; that of 3.7.1 takes their low bits. So no two of the three releases agree in both modes.
#   tl.argmax(.., tie_break_left=False) of two equal numbers: the right one in 3.7.1, the left one from 3.8.0 on.
#   tl.argmax beside a NaN: 3.7.1 gives the place of the NaN, later releases look past it.
# Output: triton 3.7.1: histogram of 0 1 1 3 4 4 4 -1 in 4 bins: [1, 2, 0, 4] (compiled code compares: False); right of two ties at 1 and 2: 2; argmax of 1 nan 5 2: 1
#         triton 3.8.0: histogram of 0 1 1 3 4 4 4 -1 in 4 bins: [1, 2, 0, 4] (compiled code compares: True); right of two ties at 1 and 2: 1; argmax of 1 nan 5 2: 2
#         triton 3.9.0: histogram of 0 1 1 3 4 4 4 -1 in 4 bins: [1, 2, 0, 1] (compiled code compares: True); right of two ties at 1 and 2: 1; argmax of 1 nan 5 2: 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/kernel.py" <<'E'
import triton
import triton.language as tl


@triton.jit
def count_kernel(ids_ptr, counts_ptr, SIZE: tl.constexpr, BINS: tl.constexpr):
    ids = tl.load(ids_ptr + tl.arange(0, SIZE))
    tl.store(counts_ptr + tl.arange(0, BINS), tl.histogram(ids, BINS))
E
cat > "$folder/compiled.py" <<'E'
import re

import triton
from kernel import count_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

signature = {"ids_ptr": "*i32", "counts_ptr": "*i32", "SIZE": "constexpr", "BINS": "constexpr"}
source = ASTSource(count_kernel, signature, {"SIZE": 128, "BINS": 4})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print(re.search(r"setp\.gt\.u32\s+%p\d+, %r\d+, 3;", ptx) is not None)
E
cat > "$folder/finding.py" <<'E'
import sys

import torch
import triton
import triton.language as tl
from kernel import count_kernel

EXPECTED = {
    "3.7.1": ([1, 2, 0, 4], 2, 1, "False"),
    "3.8.0": ([1, 2, 0, 4], 1, 2, "True"),
    "3.9.0": ([1, 2, 0, 1], 1, 2, "True"),
}


@triton.jit
def argmax_kernel(values_ptr, place_ptr, SIZE: tl.constexpr, IS_LEFT: tl.constexpr):
    values = tl.load(values_ptr + tl.arange(0, SIZE))
    tl.store(place_ptr, tl.argmax(values, 0, tie_break_left=IS_LEFT))


def argmax(values, is_left):
    place = torch.full((1,), -1, dtype=torch.int32)
    argmax_kernel[(1,)](torch.tensor(values), place, len(values), is_left)
    return place.item()


counts = torch.zeros(4, dtype=torch.int32)
count_kernel[(1,)](torch.tensor([0, 1, 1, 3, 4, 4, 4, -1], dtype=torch.int32), counts, 8, 4)
seen = counts.tolist(), argmax([1.0, 5.0, 5.0, 2.0], False), argmax([1.0, float("nan"), 5.0, 2.0], True)
print(
    f"triton {triton.__version__}: histogram of 0 1 1 3 4 4 4 -1 in 4 bins: {seen[0]} (compiled code compares: "
    f"{sys.argv[1]}); right of two ties at 1 and 2: {seen[1]}; argmax of 1 nan 5 2: {seen[2]}"
)
assert (*seen, sys.argv[1]) == EXPECTED[triton.__version__], seen
E
for triton in triton==3.7.1 triton==3.8.0 triton==3.9.0; do
  "$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/$triton" "$triton"
  export TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/$triton"
  compares=$("$folder/venv/bin/python" -W ignore "$folder/compiled.py")
  TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/finding.py" "$compares"
  unset PYTHONPATH
  rm -rf "${folder:?}/$triton"
done
