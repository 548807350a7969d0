"""The offline compiler and the stand-in driver say what is true of a kernel whose needs are known."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from emulation import offline_compile
from emulation.offline_compile import compile_kernel
from emulation.offline_driver import offline_gpu


@triton.jit
def dot_kernel(x_ptr, out_ptr, num_rows, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    offsets = lane[:, None] * SIZE + lane[None, :]
    x = tl.load(x_ptr + offsets, mask=lane[:, None] < num_rows, other=0.0)
    tl.store(out_ptr + offsets, tl.dot(x, x))


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_a_kernel_compiles_for_a_gpu_that_is_not_here(arch, instruction):
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "num_rows": "i32", "SIZE": "constexpr"}
    report = compile_kernel(dot_kernel, signature, {"SIZE": 64}, arch, num_warps=4)
    assert (report.name, report.arch, report.num_warps) == ("dot_kernel", arch, 4)
    assert report.count(instruction) > 0
    assert report.registers > 16
    assert report.spill_bytes == 0
    assert report.shared_bytes >= 64 * 64 * 2
    assert report.fits


def test_accumulators_beyond_the_registers_show_as_spills():
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "num_rows": "i32", "SIZE": "constexpr"}
    # 128 x 128 fp32 accumulators over 64 threads are 256 registers a thread.
    report = compile_kernel(dot_kernel, signature, {"SIZE": 128}, 80, num_warps=2)
    assert report.spill_bytes > 0


def test_launches_are_recorded_where_they_happen_and_nothing_runs():
    out = torch.full((64, 64), 7.0)
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    with offline_gpu(90) as first:
        dot_kernel[(3, 2)](x, out, 64, SIZE=64, num_warps=4)
    with offline_gpu(90) as second:
        for _ in range(2):
            dot_kernel[(1,)](x, out, 64, SIZE=64, num_warps=4)
    with offline_gpu(80) as other:
        dot_kernel[(1,)](x, out, 64, SIZE=64, num_warps=4)
    assert [launch.grid for launch in first.launches] == [(3, 2, 1)]
    assert [launch.grid for launch in second.launches] == [(1, 1, 1)] * 2
    assert [launch.report.arch for launch in (*second.launches, *other.launches)] == [90, 90, 80]
    assert (out == 7.0).all()


def test_a_kernel_that_needs_too_much_shared_memory_is_refused_as_on_the_gpu():
    x, out = torch.empty(256, 256, dtype=torch.bfloat16), torch.empty(256, 256)
    with offline_gpu(89), pytest.raises(triton.runtime.errors.OutOfResources):
        dot_kernel[(1,)](x, out, 256, SIZE=256, num_warps=8)


def test_ptxas_is_the_one_that_triton_uses_with_what_it_passes(monkeypatch):
    commands = []
    monkeypatch.setattr(offline_compile, "_run", lambda *command: commands.append(command) or "")
    ran = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: ran.append(command) or real(command, **more))
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "num_rows": "i32", "SIZE": "constexpr"}
    monkeypatch.setattr(offline_compile, "_registers_and_stack", lambda cubin: (255, 8))
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    for arch in (80, 90, 100):
        report = compile_kernel(dot_kernel, signature, {"SIZE": 64}, arch, num_warps=4)
        assert report.spill_bytes == 0
        of_triton = next(command for command in ran if "-v" in command)
        flags = [[part for part in command if "regAlloc" in part] for command in (commands[-1], of_triton)]
        assert flags[0] == flags[1]
        assert commands[-1][0] == of_triton[0]
        ran.clear()
