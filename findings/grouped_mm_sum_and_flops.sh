#!/usr/bin/env bash
# torch 2.13.0, torch.nn.functional.grouped_mm on a CPU, bfloat16.
# One expects it to be to autograd and to FlopCounterMode what the products of its groups are. The backward of
# `.sum()` is refused, for the gradient that sum hands back is one number expanded to strides of 0, and grouped_mm wants
# strides of a matrix; through bmm the same works. And FlopCounterMode counts 0 where the bmm of the same groups has 196608.
# Output: torch 2.13.0: backward of sum: grouped_mm RuntimeError, bmm works; FLOPs: grouped_mm 0, bmm 196608
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/finding.py" <<'E'
import torch
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import FlopCounterMode

GROUPS, ROWS, K, N = 4, 16, 32, 48
rows = torch.randn(GROUPS * ROWS, K, dtype=torch.bfloat16, requires_grad=True)
weights = torch.randn(GROUPS, K, N, dtype=torch.bfloat16)
offsets = torch.arange(ROWS, GROUPS * ROWS + 1, ROWS, dtype=torch.int32)


def by_grouped_mm():
    return grouped_mm(rows, weights, offs=offsets)


def by_bmm():
    return torch.bmm(rows.view(GROUPS, ROWS, K), weights)


def backward_of_sum(product):
    try:
        product().sum().backward()
    except RuntimeError as error:
        assert "strides" in str(error), error
        return "RuntimeError"
    return "works"


def flops(product):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        product()
    return counter.get_total_flops()


torch.testing.assert_close(by_grouped_mm().view(GROUPS, ROWS, N), by_bmm())
sums = [backward_of_sum(product) for product in (by_grouped_mm, by_bmm)]
counts = [flops(product) for product in (by_grouped_mm, by_bmm)]
print(
    f"torch {torch.__version__.split('+')[0]}: backward of sum: grouped_mm {sums[0]}, bmm {sums[1]}; "
    f"FLOPs: grouped_mm {counts[0]}, bmm {counts[1]}"
)
assert sums == ["RuntimeError", "works"] and counts == [0, 2 * GROUPS * ROWS * K * N], (sums, counts)
E
"$folder/venv/bin/python" -W ignore "$folder/finding.py"
