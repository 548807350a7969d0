"""What runs with a Triton that nobody knew when this was written, or whose Gluon has other names: the portable GEMMs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

TESTS = Path(__file__).parents[1]
NEWER = "triton.__version__ = '3.10.2'"
WITHOUT_NAMES = "from triton.experimental.gluon.language.nvidia import hopper; del hopper.warpgroup_mma"
WITHOUT_GLUON = "sys.modules['triton.experimental.gluon'] = None"
RUN = """
import json, sys, warnings
import triton
{change}
sys.path.insert(0, {tests!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import moe
    from emulation.offline_driver import offline_gpu
    from gemm.hopper.cases import permutation_of_counts
    from moe.gemm import kernels

    # Where it was taken away, from us alone: Triton finds its own package, wherever it lies.
    if sys.modules.get("triton.experimental.gluon", "") is None:
        del sys.modules["triton.experimental.gluon"]
    config = moe.MoEConfig.create(hidden_size=128, intermediate_size=128, num_experts=4, top_k=2)
    moe.build_pipeline(config, "cuda")
    permutation = permutation_of_counts([5, 9, 0, 2], 64, 8)
    w1, w2 = (torch.zeros(gemm.weight_shape).bfloat16() for gemm in (config.gemm1, config.gemm2))
    with offline_gpu(90) as gpu:
        for _ in range(2):
            rows = kernels.run_gemm1(torch.zeros(8, 128).bfloat16(), w1, permutation, config=config.gemm1)
            kernels.run_gemm2(rows, w2, permutation, config=config.gemm2)
print(json.dumps({{
    "families": [kernel.family for table in kernels.KERNELS.values() for kernel in table],
    "launched": sorted({{launch.name for launch in gpu.launches}}),
    "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
}}))
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (NEWER, "triton: expected 3.6 to 3.9, got 3.10.2; "),
        (WITHOUT_NAMES, "without what Hopper's kernels call (cannot import name 'warpgroup_mma'"),
        (WITHOUT_GLUON, "without what Hopper's kernels call (import of triton.experimental.gluon halted"),
        (f"{NEWER}; {WITHOUT_NAMES}", "triton: expected 3.6 to 3.9, got 3.10.2; "),
    ],
    ids=["newer", "without_names", "without_gluon", "newer_without_names"],
)
def test_the_portable_kernels_run_and_one_warning_says_why(change, says):
    code = RUN.format(change=change, tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["families"] == ["portable", "portable"]
    assert found["launched"] == ["portable_gemm1_kernel", "portable_gemm2_kernel"]
    (warning,) = found["warnings"]
    assert says in warning
    assert "expected 3.6 to 3.9, got" in warning
