#!/usr/bin/env bash
# Triton 3.7.1, 3.8.0 and 3.9.0, Gluon, compiled for compute capability 9.0 without a GPU or torch.
# One asks hasattr for the old name of a copy to know which release one has. tma.async_copy_global_to_shared was renamed
# async_load in 3.8.0, where both compile; in 3.9.0 the old one is still an attribute but a call of it does not compile.
# So it is the new name that has to be asked for.
# Output: triton 3.7.1: async_copy_global_to_shared is there: True, compiles: True; async_load is there: False
#         triton 3.8.0: async_copy_global_to_shared is there: True, compiles: True; async_load is there: True
#         triton 3.9.0: async_copy_global_to_shared is there: True, compiles: False; async_load is there: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
cat > "$folder/finding.py" <<'E'
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

EXPECTED = {"3.7.1": (True, True, False), "3.8.0": (True, True, True), "3.9.0": (True, False, True)}


@gluon.jit
def copy_kernel(desc):
    box = gl.allocate_shared_memory(gl.bfloat16, [64, 64], desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [0, 0], bar, box)
    mbarrier.wait(bar, 0)


def compiles():
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    source = GluonASTSource(copy_kernel, {"desc": f"tensordesc<bf16[64, 64],{layout!r}>"}, {}, {})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except CompilationError as error:
        assert "async_load" in str(error), error
        return False
    return True


seen = hasattr(tma, "async_copy_global_to_shared"), compiles(), hasattr(tma, "async_load")
print(
    f"triton {triton.__version__}: async_copy_global_to_shared is there: {seen[0]}, compiles: {seen[1]}; "
    f"async_load is there: {seen[2]}"
)
assert seen == EXPECTED[triton.__version__], seen
E
for triton in triton==3.7.1 triton==3.8.0 triton==3.9.0; do
  "$python" -m pip install -q --no-compile --no-deps --disable-pip-version-check --target "$folder/$triton" "$triton"
  TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/$triton" "$folder/venv/bin/python" -W ignore "$folder/finding.py"
  rm -rf "${folder:?}/$triton"
done
