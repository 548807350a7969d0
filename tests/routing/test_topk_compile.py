"""Every routing kernel compiles for Hopper, without a GPU, and keeps a token's scores in registers."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from routing.cases import DTYPE_IDS, METHODS, config_of, grouped

from moe.runtime.numba_launch import NumbaKernel

pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")

HOPPER = (9, 0)
REGISTERS_FOR_FULL_OCCUPANCY = 65536 // 2048  # a thread


def kernel_for(
    config, logits_dtype=torch.float32, bias_dtype: torch.dtype | None = None, *, writes_replay: bool = False
) -> NumbaKernel:
    from moe.routing.topk import kernel_of

    return kernel_of(config, logits_dtype, bias_dtype, writes_replay)


def resources(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack, spills included, that a thread of the kernel takes on sm_90."""
    knobs = pytest.importorskip("triton.knobs")
    nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink")
    linker = nvjitlink.create(1, ["-arch=sm_90"])
    nvjitlink.add_data(linker, nvjitlink.InputType.PTX, ptx.encode(), len(ptx), "kernel")
    nvjitlink.complete(linker)
    cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
    nvjitlink.get_linked_cubin(linker, cubin)
    nvjitlink.destroy(linker)
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    listing = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    figures = re.findall(r"REG:(\d+) STACK:(\d+)", listing)
    assert figures, listing
    return max(int(registers) for registers, _ in figures), max(int(stack) for _, stack in figures)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.value)
def test_every_method_compiles(method, logits_dtype):
    config = config_of(method, 96, 6)
    bias_dtype = logits_dtype if method.uses_bias else None
    ptx = kernel_for(config, logits_dtype, bias_dtype, writes_replay=True).compile_ptx(HOPPER)
    assert "redux.sync.max.u32" in ptx
    assert ".f64" not in ptx, "float64 arithmetic slipped in"
    assert not re.search(r"(tanh\.approx|div\.(approx|full))", ptx), "fast math slipped in"


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32], ids=DTYPE_IDS.get)
def test_groups_compile(bias_dtype):
    ptx = kernel_for(grouped(256, 8, 8, 4), bias_dtype=bias_dtype).compile_ptx(HOPPER)
    assert "redux.sync.max.u32" in ptx
    assert ".f64" not in ptx, "float64 arithmetic slipped in"


@pytest.mark.parametrize(
    ("config", "max_registers", "max_stack"),
    [
        (config_of(METHODS[1], 8, 2), REGISTERS_FOR_FULL_OCCUPANCY, 0),
        (config_of(METHODS[1], 128, 8), REGISTERS_FOR_FULL_OCCUPANCY, 0),
        (config_of(METHODS[1], 256, 8), 40, 0),
        (config_of(METHODS[2], 384, 8), 48, 0),
        (config_of(METHODS[1], 512, 10), 56, 0),
        (config_of(METHODS[0], 512, 32), 64, 0),
        (config_of(METHODS[1], 2048, 8), 96, 0),
        (config_of(METHODS[1], 2048, 32), 112, 0),
        (grouped(256, 8, 8, 4), 48, 0),
    ],
    ids=lambda value: f"{value.method.value}-E{value.num_experts}-K{value.top_k}" if hasattr(value, "method") else "",
)
def test_scores_stay_in_registers(config, max_registers, max_stack, tmp_path):
    bias_dtype = torch.float32 if config.method.uses_bias else None
    registers, stack_bytes = resources(kernel_for(config, bias_dtype=bias_dtype).compile_ptx(HOPPER), tmp_path)
    assert stack_bytes <= max_stack
    assert registers <= max_registers


def test_replay_is_left_out_of_a_kernel_that_does_not_write_it():
    config = config_of(METHODS[1], 64, 4)
    stores = [kernel_for(config, writes_replay=w).compile_ptx(HOPPER).count("st.global.u16") for w in (False, True)]
    assert stores == [1, 2]


@pytest.mark.parametrize("config", [config_of(METHODS[1], 128, 8), grouped(256, 8, 8, 4)], ids=["plain", "groups"])
def test_the_kernel_waits_before_it_touches_memory_and_lets_the_next_one_start_where_it_is_asked_to(config):
    from moe.routing.topk import kernel_of

    for uses_pdl in (False, True):
        kernel = kernel_of(config, torch.float32, None, False, uses_pdl=uses_pdl)
        ptx = kernel.compile_ptx(HOPPER)
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == uses_pdl
        if uses_pdl:
            before_wait, after_wait = ptx.split("griddepcontrol.wait")
            assert "ld.global" not in before_wait
            assert "griddepcontrol.launch_dependents" in after_wait
    assert "griddepcontrol" not in kernel_of(config, torch.float32, None, False).compile_ptx((8, 0))


@pytest.mark.parametrize(
    ("num_experts", "load"),
    [(128, "ld.global.v4.u32"), (66, "ld.global.v2.u32"), (65, "ld.global.u32")],
    ids=lambda value: str(value),
)
def test_a_lane_loads_as_many_neighbours_at_once_as_rows_allow(num_experts, load):
    ptx = kernel_for(config_of(METHODS[1], num_experts, 2)).compile_ptx(HOPPER)
    loads = set(re.findall(r"ld\.global[.\w]*", ptx.replace(".nc", "").replace(".f32", ".u32")))
    assert load in loads
