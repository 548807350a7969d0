#!/usr/bin/env bash
# torch 2.13.0, torch.compile with inductor (it needs a C++ compiler).
# A graph input is changed by a custom operator, cloned, and changed again. One expects the clone to keep the state in
# between, as in eager mode and with the backend aot_eager. Inductor's clone shows the state after the second change,
# without a word. `x * 1.0` in its place, built-in add_, or a tensor that is not an input of the graph: all right.
# Output: torch 2.13.0: the clone between two custom mutations of an input is 1.0 in eager, 1.0 in aot_eager, 2.0 in inductor; x * 1.0: 1.0; add_: 1.0; not an input: 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/finding.py" <<'E'
import torch


@torch.library.custom_op("finding::bump", mutates_args={"x"})
def bump(x: torch.Tensor) -> None:
    x.add_(1)


def cloned(x):
    bump(x)
    between = x.clone()
    bump(x)
    return between


def multiplied(x):
    bump(x)
    between = x * 1.0
    bump(x)
    return between


def built_in(x):
    x.add_(1)
    between = x.clone()
    x.add_(1)
    return between


def not_an_input(x):
    return cloned(x + 0)


def first(function, backend):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)(torch.zeros(4))[0].item()


seen = [cloned(torch.zeros(4))[0].item(), first(cloned, "aot_eager"), first(cloned, "inductor")]
others = [first(function, "inductor") for function in (multiplied, built_in, not_an_input)]
print(
    f"torch {torch.__version__.split('+')[0]}: the clone between two custom mutations of an input is {seen[0]} in eager, {seen[1]} in "
    f"aot_eager, {seen[2]} in inductor; x * 1.0: {others[0]}; add_: {others[1]}; not an input: {others[2]}"
)
assert seen == [1.0, 1.0, 2.0] and others == [1.0, 1.0, 1.0], (seen, others)
E
TMPDIR="$folder" TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
