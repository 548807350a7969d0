#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1, compiled for compute capability 9.0 without a GPU or torch.
# A jit function has a parameter `MODE: tl.constexpr` with a default, and is called from another without it. One expects the
# default to be a constant, as a number's, a bool's and what a kernel is launched with are. In 3.6.0 a string's is not: the
# function does not compile ('str' object has no attribute 'type'), unless the default is written tl.constexpr("double")
# or the caller says the same string. In 3.7.1 it does.
# Output: triton 3.6.0: default of a string CompilationError, the same said by the caller ok, tl.constexpr of a string ok, number ok, bool ok
#         triton 3.7.1: default of a string ok, the same said by the caller ok, tl.constexpr of a string ok, number ok, bool ok
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
cat > "$folder/finding.py" <<'E'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

EXPECTED = {"3.6.0": ["CompilationError", "ok", "ok", "ok", "ok"], "3.7.1": ["ok"] * 5}


@triton.jit
def by_string(x, MODE: tl.constexpr = "double"):
    if MODE == "double":
        return x * 2
    else:
        return x


@triton.jit
def by_constexpr(x, MODE: tl.constexpr = tl.constexpr("double")):
    if MODE == "double":
        return x * 2
    else:
        return x


@triton.jit
def by_number(x, TIMES: tl.constexpr = 2):
    if TIMES == 2:
        return x * 2
    else:
        return x


@triton.jit
def by_bool(x, DOUBLES: tl.constexpr = True):
    if DOUBLES:
        return x * 2
    else:
        return x


@triton.jit
def string_kernel(ptr):
    tl.store(ptr, by_string(tl.load(ptr)))


@triton.jit
def said_kernel(ptr):
    tl.store(ptr, by_string(tl.load(ptr), "double"))


@triton.jit
def constexpr_kernel(ptr):
    tl.store(ptr, by_constexpr(tl.load(ptr)))


@triton.jit
def number_kernel(ptr):
    tl.store(ptr, by_number(tl.load(ptr)))


@triton.jit
def bool_kernel(ptr):
    tl.store(ptr, by_bool(tl.load(ptr)))


def outcome(kernel):
    try:
        triton.compile(ASTSource(kernel, {"ptr": "*fp32"}, {}), target=GPUTarget("cuda", 90, 32))
    except CompilationError as error:
        return type(error).__name__
    return "ok"


found = [outcome(kernel) for kernel in (string_kernel, said_kernel, constexpr_kernel, number_kernel, bool_kernel)]
print(
    f"triton {triton.__version__}: default of a string {found[0]}, the same said by the caller {found[1]}, "
    f"tl.constexpr of a string {found[2]}, number {found[3]}, bool {found[4]}"
)
assert found == EXPECTED[triton.__version__], found
E
for triton in triton==3.6.0 triton==3.7.1; do
  "$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/$triton" "$triton"
  TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/$triton" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
  rm -rf "${folder:?}/$triton"
done
