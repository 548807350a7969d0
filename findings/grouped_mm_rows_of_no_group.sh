#!/usr/bin/env bash
# torch 2.13.0, torch.nn.functional.grouped_mm on a CPU, bfloat16.
# Rows after the last offset belong to no group. One expects zeros, as from a loop that adds each group's product. They are
# memory that nobody wrote, in the result and in the gradient of the input too, so a weight of 0 does not silence them
# where they are NaN. torch's own filling of new memory shows it. A group without rows, however, gets a gradient of zeros.
# Output: torch 2.13.0: of 8 rows past the last offset, NaN in the result: 8, in the input's gradient: 8, in the rows before: 0, 0; gradient of an empty group: 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/finding.py" <<'E'
import torch
from torch.nn.functional import grouped_mm

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # the default: torch.empty gives NaN

torch.manual_seed(0)
rows = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
weights = torch.randn(4, 32, 48, dtype=torch.bfloat16, requires_grad=True)
offsets = torch.tensor([16, 16, 40, 56], dtype=torch.int32)

result = grouped_mm(rows, weights, offs=offsets)
result.backward(torch.ones_like(result))
num_nan = [
    part.isnan().any(1).sum().item() for whole in (result, rows.grad) for part in (whole[56:], whole[:56])
]
empty = weights.grad[1].abs().max().item()
print(
    f"torch {torch.__version__.split('+')[0]}: of 8 rows past the last offset, NaN in the result: {num_nan[0]}, in the input's gradient: "
    f"{num_nan[2]}, in the rows before: {num_nan[1]}, {num_nan[3]}; gradient of an empty group: {empty}"
)
assert num_nan == [8, 0, 8, 0] and empty == 0, (num_nan, empty)
E
"$folder/venv/bin/python" -W ignore "$folder/finding.py"
