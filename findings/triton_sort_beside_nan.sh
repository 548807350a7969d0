#!/usr/bin/env bash
# Triton 3.9.0 with torch 2.13.0, in the interpreter (TRITON_INTERPRET=1); tl.sort is Triton's own code in both modes.
# One expects what a sort gives to hold the values it got, NaN at one end as torch has it. Each pair of tl.sort keeps
# or takes by `x > y` on both sides of it, which is false on both where one is NaN: both keep the same value, so that NaN is lost
# and its neighbour stands there twice. tl.topk does the same to a NaN that torch.topk puts first.
# Output: triton 3.9.0: sort of 5 nan 7 1 3 8 2 6: [1.0, 2.0, 3.0, 5.0, 5.0, 6.0, 7.0, 8.0]; its topk of 2: [8.0, 7.0], of torch: [nan, 8.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/triton" triton==3.9.0
cat > "$folder/finding.py" <<'E'
import torch
import triton
import triton.language as tl


@triton.jit
def sort_kernel(values_ptr, sorted_ptr, top_ptr, SIZE: tl.constexpr, K: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(values_ptr + offsets)
    tl.store(sorted_ptr + offsets, tl.sort(values))
    tl.store(top_ptr + tl.arange(0, K), tl.topk(values, K))


values = torch.tensor([5, float("nan"), 7, 1, 3, 8, 2, 6])
in_order, top = torch.zeros(8), torch.zeros(2)
sort_kernel[(1,)](values, in_order, top, 8, 2)
of_torch = values.topk(2).values
print(
    f"triton {triton.__version__}: sort of 5 nan 7 1 3 8 2 6: {in_order.tolist()}; its topk of 2: {top.tolist()}, "
    f"of torch: {of_torch.tolist()}"
)
assert in_order.tolist() == [1, 2, 3, 5, 5, 6, 7, 8] and top.tolist() == [8, 7], (in_order, top)
assert of_torch[0].isnan() and of_torch[1] == 8, of_torch
E
TRITON_INTERPRET=1 PYTHONPATH="$folder/triton" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
