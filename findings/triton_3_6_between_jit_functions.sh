#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1, compiled for compute capability 9.0 without a GPU or torch. What one jit function can read, one expects
# it to be able to hand to another. In 3.6.0 it is not so, in 3.7.1 it is:
#   a NamedTuple with a field of None goes into a jit function, but not out of one;
#   Gluon's desc.layout makes shared memory where it is read, and once it has been named a constexpr it goes into another function,
#   but as an argument written in place it is refused, for having no _flatten_ir.
# Output: triton 3.6.0: None in a NamedTuple: taken ok, returned CompilationError; desc.layout: used ok, named and passed ok, passed CompilationError
#         triton 3.7.1: None in a NamedTuple: taken ok, returned ok; desc.layout: used ok, named and passed ok, passed ok
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
cat > "$folder/finding.py" <<'E'
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

EXPECTED = {
    "3.6.0": ["ok", "CompilationError", "ok", "ok", "CompilationError"],
    "3.7.1": ["ok", "ok", "ok", "ok", "ok"],
}


class Rows(NamedTuple):
    values_ptr: Any
    scale_ptr: Any


@triton.jit
def load(rows, offsets):
    values = tl.load(rows.values_ptr + offsets)
    if rows.scale_ptr is not None:
        values *= tl.load(rows.scale_ptr)
    return values


@triton.jit
def rows_of(values_ptr, scale_ptr):
    return Rows(values_ptr, scale_ptr)


@triton.jit
def taken_kernel(values_ptr, out_ptr):
    offsets = tl.arange(0, 128)
    tl.store(out_ptr + offsets, load(Rows(values_ptr, None), offsets))


@triton.jit
def returned_kernel(values_ptr, out_ptr):
    offsets = tl.arange(0, 128)
    tl.store(out_ptr + offsets, load(rows_of(values_ptr, None), offsets))


@gluon.jit
def allocate(LAYOUT: gl.constexpr):
    return gl.allocate_shared_memory(gl.bfloat16, [64, 64], LAYOUT)


@gluon.jit
def used_kernel(desc):
    gl.allocate_shared_memory(gl.bfloat16, [64, 64], desc.layout)


@gluon.jit
def named_kernel(desc):
    LAYOUT: gl.constexpr = desc.layout
    allocate(LAYOUT)


@gluon.jit
def passed_kernel(desc):
    allocate(desc.layout)


def outcome(source):
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except CompilationError as error:
        return type(error).__name__
    return "ok"


pointers = {"values_ptr": "*fp32", "out_ptr": "*fp32"}
layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
descriptor = {"desc": f"tensordesc<bf16[64, 64],{layout!r}>"}
seen = [outcome(ASTSource(kernel, pointers, {})) for kernel in (taken_kernel, returned_kernel)]
seen += [outcome(GluonASTSource(kernel, descriptor, {}, {})) for kernel in (used_kernel, named_kernel, passed_kernel)]
print(
    f"triton {triton.__version__}: None in a NamedTuple: taken {seen[0]}, returned {seen[1]}; desc.layout: used {seen[2]}, "
    f"named and passed {seen[3]}, passed {seen[4]}"
)
assert seen == EXPECTED[triton.__version__], seen
E
for triton in triton==3.6.0 triton==3.7.1; do
  "$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/$triton" "$triton"
  TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/$triton" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
  rm -rf "${folder:?}/$triton"
done
