#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 convert the same float32 to two float8 formats of the same name.
# One expects the same bytes. They agree on rounding, but
#   float8_e4m3fn   over 464: torch gives 448, even for infinity, so that an overflow is no longer seen; ml_dtypes gives NaN.
#                   float8_e5m2 does not saturate: torch too gives infinity there.
#   float8_e8m0fnu  (scales of MX blocks) 0: torch gives code 0, which is 2^-127, ml_dtypes 255, which is NaN;
#                   -3: torch drops the sign and gives 4, ml_dtypes NaN.
# Output: torch 2.13.0 / ml_dtypes 0.6.0: e4m3fn of 464: 448.0 / 448.0; 480: 448.0 / nan; inf: 448.0 / nan; e5m2 of inf: inf / inf
#         e8m0fnu of 0: code 0 / 255; -3: 4.0 / nan; 1.5: 2.0 / 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 ml_dtypes==0.6.0
cat > "$folder/finding.py" <<'E'
import ml_dtypes
import numpy as np
import torch


def both(value, name):
    array = np.array([value], np.float32)
    ours = torch.from_numpy(array).to(getattr(torch, name))
    theirs = array.astype(getattr(ml_dtypes, name))
    codes = ours.view(torch.uint8).item(), theirs.view(np.uint8).item()
    return f"{ours.float().item()} / {theirs.astype(np.float32).item()}", codes


e4m3 = [both(value, "float8_e4m3fn")[0] for value in (464, 480, np.inf)]
e5m2 = both(np.inf, "float8_e5m2")[0]
zero_codes = both(0, "float8_e8m0fnu")[1]
e8m0 = [both(value, "float8_e8m0fnu")[0] for value in (-3, 1.5)]
print(
    f"torch {torch.__version__.split('+')[0]} / ml_dtypes {ml_dtypes.__version__}: e4m3fn of 464: {e4m3[0]}; 480: {e4m3[1]}; "
    f"inf: {e4m3[2]}; e5m2 of inf: {e5m2}"
)
print(f"e8m0fnu of 0: code {zero_codes[0]} / {zero_codes[1]}; -3: {e8m0[0]}; 1.5: {e8m0[1]}")
assert e4m3 == ["448.0 / 448.0", "448.0 / nan", "448.0 / nan"] and e5m2 == "inf / inf", (e4m3, e5m2)
assert zero_codes == (0, 255) and e8m0 == ["4.0 / nan", "2.0 / 2.0"], (zero_codes, e8m0)
E
"$folder/venv/bin/python" -W ignore "$folder/finding.py"
