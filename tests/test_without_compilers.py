"""What works where there is neither Triton nor numba nor cuda-core, as on a Mac: all that a CPU needs."""

import os
import subprocess
import sys

import pytest

HIDE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "numba", "numba_cuda", "cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
LAYER = """
import torch, moe, moe.parallel, moe.tuning
config = moe.MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)
def normal(*shape): return torch.randn(*shape).bfloat16()
tensors = torch.randn(3, 4), normal(3, 64), normal(4, 128, 64), normal(4, 64, 64)
expected = moe.reference_pipeline(config)(*tensors)
assert torch.equal(moe.build_pipeline(config, "cpu")(*tensors), expected)
print(list(expected.shape))
"""
FLAT_CALL = """
import torch, moe
def normal(*shape): return torch.randn(*shape).bfloat16()
logits, tokens, w1, w2 = torch.randn(3, 4), normal(3, 64), normal(4, 1, 128, 64), normal(4, 1, 64, 64)
print(list(moe.trtllm_bf16_moe(logits, None, tokens, w1, w2, 4, 2, 0, 0, 64, 0, 4, 1.0, 1).shape))
"""
INFO = "from moe.__main__ import main; main(['info', '--device', 'cpu']); print([3, 64])"


@pytest.mark.parametrize("code", [LAYER, FLAT_CALL, INFO], ids=["layer", "flat_call", "info"])
def test_a_cpu_needs_no_compiler_of_kernels(code: str):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "NUMBA"))}
    done = subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[3, 64]"
