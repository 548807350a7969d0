#!/usr/bin/env bash
# Triton 3.8.0 and 3.9.0 with torch 2.13.0, in the interpreter (TRITON_INTERPRET=1), bfloat16.
# One expects argmax to say where the max lies, and a later release to do no worse. In 3.9.0, max and argmax of one tensor
# disagree, as argmax and cumsum there compare and add the 16 bits as integers: argmax points at the most negative number,
# and 1 + 2 is infinity. 3.8.0 gets these three right, although its sum goes by the bits as well, as in 3.9.0.
# Output: triton 3.8.0: of 1 2 3 -4: max 3.0, argmax 2, cumsum [1.0, 3.0, 6.0, 2.0], sum is right: False
#         triton 3.9.0: of 1 2 3 -4: max 3.0, argmax 3, cumsum [1.0, inf, -1.5, -5.877471754111438e-39], sum is right: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/finding.py" <<'E'
import torch
import triton
import triton.language as tl

EXPECTED = {
    "3.8.0": (3.0, 2, [1.0, 3.0, 6.0, 2.0], False),
    "3.9.0": (3.0, 3, [1.0, float("inf"), -1.5, -(2.0**-127)], False),
}


@triton.jit
def reduce_kernel(values_ptr, max_ptr, place_ptr, sums_ptr, sum_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(values_ptr + offsets)
    tl.store(max_ptr, tl.max(values, 0))
    tl.store(place_ptr, tl.argmax(values, 0))
    tl.store(sums_ptr + offsets, tl.cumsum(values, 0))
    tl.store(sum_ptr, tl.sum(values, 0))


values = torch.tensor([1, 2, 3, -4], dtype=torch.bfloat16)
largest, total = torch.zeros(2, 1, dtype=torch.bfloat16)
place = torch.zeros(1, dtype=torch.int32)
sums = torch.zeros_like(values)
reduce_kernel[(1,)](values, largest, place, sums, total, 4)
seen = largest.item(), place.item(), sums.tolist(), total.item() == 2
print(
    f"triton {triton.__version__}: of 1 2 3 -4: max {seen[0]}, argmax {seen[1]}, cumsum {seen[2]}, sum is right: {seen[3]}"
)
assert seen == EXPECTED[triton.__version__], seen
E
for triton in triton==3.8.0 triton==3.9.0; do
  "$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/$triton" "$triton"
  TRITON_INTERPRET=1 PYTHONPATH="$folder/$triton" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
  rm -rf "${folder:?}/$triton"
done
