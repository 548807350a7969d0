"""What the compiler makes of the launches that host code issues, on GPUs that this machine need not have."""

from __future__ import annotations

import os

import pytest
import torch
from emulation.offline_driver import OfflineGpu, offline_gpu
from routing.test_topk_compile import resources

from moe.flow import Added, TopK
from moe.gemm.swapped.tile import SWAPPED_UNITS
from moe.gemm.wide.tile import WIDE_UNITS
from moe.permute.config import FinalizeConfig, PermuteConfig

ARCHITECTURES = [80, 90, 100]
HOPPER = (9, 0)
MAX_SPILL_BYTES = 16  # a thread: an address or two that ptxas sets aside to fit one more block on a multiprocessor


def launches_of_plan(num_tokens: int, num_experts: int, arch: int) -> OfflineGpu:
    from moe.permute.triton_plan import plan_permutation

    config = PermuteConfig(num_experts=num_experts, num_local_experts=num_experts, top_k=8)
    expert_ids = torch.zeros(num_tokens, 8, dtype=torch.int32)
    with offline_gpu(arch) as gpu:
        plan_permutation(TopK(expert_ids, torch.zeros(num_tokens, 8)), config=config)
    return gpu


def launches_of_finalize(
    num_tokens: int,
    hidden_size: int,
    weights: torch.dtype,
    arch: int,
    top_k: int = 8,
    added: Added | None = None,
    *,
    uses_pdl: bool = False,
    is_sparse: bool = False,
) -> OfflineGpu:
    from moe.permute.finalize import finalize_tokens
    from moe.permute.reference import plan_permutation_reference

    config = PermuteConfig(num_experts=512, num_local_experts=32, top_k=top_k)
    topk = TopK(torch.zeros(num_tokens, top_k, dtype=torch.int32), torch.zeros(num_tokens, top_k, dtype=weights))
    permutation = plan_permutation_reference(topk, config=config)
    rows = torch.empty(permutation.max_rows, hidden_size, dtype=torch.bfloat16)
    with offline_gpu(arch) as gpu:
        finalize_tokens(
            rows, topk, permutation, config=FinalizeConfig(is_sparse=is_sparse), added=added, uses_pdl=uses_pdl
        )
    return gpu


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")
@pytest.mark.parametrize("totals", ["chunk", "slots", "counts"])
@pytest.mark.parametrize(("num_bins", "num_warps"), [(32, 8), (128, 32), (512, 32), (2048, 8), (2048, 32)])
def test_a_block_of_the_plan_finds_its_registers(num_bins, num_warps, totals, tmp_path) -> None:
    from moe.permute.numba_block import Totals
    from moe.permute.numba_plan import plan_kernel_of

    kernel = plan_kernel_of(num_bins, num_warps, 8, Totals(totals))
    registers, stack_bytes = resources(kernel.compile_ptx(HOPPER), tmp_path)
    assert stack_bytes == 0
    assert registers * kernel.threads_per_block <= 65536


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")
@pytest.mark.parametrize("unit_size", [SWAPPED_UNITS, WIDE_UNITS], ids=["swapped", "wide"])
@pytest.mark.parametrize(
    ("num_bins", "num_warps", "totals"),
    [(32, 8, "chunk"), (128, 32, "slots"), (256, 32, "counts"), (512, 32, "counts"), (2048, 32, "chunk")],
)
def test_a_block_that_makes_units_too_finds_its_registers(num_bins, num_warps, totals, unit_size, tmp_path) -> None:
    from moe.permute.numba_block import Totals
    from moe.permute.numba_plan import plan_kernel_of

    kernel = plan_kernel_of(num_bins, num_warps, 8, Totals(totals), unit_size, uses_pdl=True)
    registers, stack_bytes = resources(kernel.compile_ptx(HOPPER), tmp_path)
    assert stack_bytes == 0
    assert registers * kernel.threads_per_block <= 65536


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")
@pytest.mark.parametrize("num_bins", [32, 2048])
def test_counting_leaves_room_for_two_blocks_on_a_multiprocessor(num_bins, tmp_path) -> None:
    from moe.permute.numba_plan import WARPS, count_kernel_of

    kernel = count_kernel_of(num_bins, WARPS)
    registers, stack_bytes = resources(kernel.compile_ptx(HOPPER), tmp_path)
    assert stack_bytes == 0
    assert 2 * registers * kernel.threads_per_block <= 65536


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")
@pytest.mark.parametrize("uses_pdl", [False, True], ids=["alone", "dependent"])
def test_planning_kernels_wait_and_trigger_once_where_they_are_dependent(uses_pdl) -> None:
    from moe.permute.numba_block import Totals
    from moe.permute.numba_plan import count_kernel_of, plan_kernel_of

    kernels = [count_kernel_of(128, 32, uses_pdl=uses_pdl)]
    kernels += [plan_kernel_of(128, 32, 8, totals, uses_pdl=uses_pdl) for totals in Totals]
    for kernel in kernels:
        ptx = kernel.compile_ptx(HOPPER)
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == uses_pdl
        if uses_pdl:
            before_wait = ptx.split("griddepcontrol.wait")[0]
            assert "ld.global" not in before_wait
            assert "st.global" not in before_wait


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("num_experts", [256, 2048])
def test_plan_of_few_slots_is_one_launch_that_fits(num_experts, arch) -> None:
    (launch,) = launches_of_plan(512, num_experts, arch).launches
    assert launch.name == "plan_kernel"
    assert launch.grid == (16, 1, 1)
    assert launch.report.fits
    assert launch.report.spill_bytes <= MAX_SPILL_BYTES


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("num_experts", "num_scans"), [(256, 16), (2048, 128)], ids=["E256", "E2048"])
def test_plan_of_many_slots_is_three_launches_that_fit(num_experts, num_scans, arch) -> None:
    launches = launches_of_plan(8192, num_experts, arch).launches
    assert [launch.name for launch in launches] == ["count_kernel", "scan_kernel", "place_kernel"]
    assert [launch.grid[0] for launch in launches] == [256, num_scans, 256]
    assert all(launch.report.fits for launch in launches)
    assert max(launch.report.spill_bytes for launch in launches) <= MAX_SPILL_BYTES
    # Two blocks of 256 threads on a multiprocessor of 65536 registers at least.
    assert launches[-1].report.registers <= 128


def test_many_slots_take_chunks_of_several_blocks() -> None:
    launches = launches_of_plan(1 << 17, 256, 90).launches
    assert [launch.grid[0] for launch in launches] == [512, 16, 512]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "fp32_weights"])
@pytest.mark.parametrize("hidden_size", [2056, 7168])
def test_finalize_reads_and_writes_sixteen_bytes_at_once(hidden_size, weights, arch) -> None:
    (launch,) = launches_of_finalize(32, hidden_size, weights, arch).launches
    assert launch.grid == (32 * -(-hidden_size // 1024), 1, 1)
    assert launch.report.spill_bytes == 0
    assert launch.report.count("ld.global.v4") == 8
    assert launch.report.count("st.global.v4") == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_many_tokens_of_few_rows_branch_over_the_others_and_read_a_whole_row_at_once(arch) -> None:
    (few,), (many,) = (
        launches_of_finalize(n, 7168, torch.bfloat16, arch, is_sparse=True).launches for n in (1023, 1024)
    )
    assert few.grid == (1023 * 7, 1, 1)
    assert many.grid == (1024, 1, 1)
    assert many.report.spill_bytes == 0
    assert many.report.count("ld.global.v4") == 8 * 4
    assert many.report.count("st.global.v4") == 4


@pytest.mark.parametrize(
    "gate", [None, 0.5, torch.empty(32), torch.empty(32).bfloat16()], ids=["", "0.5", "fp32", "bf16"]
)
def test_what_is_added_takes_one_load_more_ahead_of_the_wait(gate) -> None:
    added = Added(torch.empty(32, 2048, dtype=torch.bfloat16), gate)
    (launch,) = launches_of_finalize(32, 2048, torch.bfloat16, 90, added=added, uses_pdl=True).launches
    assert launch.report.spill_bytes == 0
    assert launch.report.count("ld.global.v4") == 9
    before_wait = launch.report.ptx.split("griddepcontrol.wait")[0]
    assert before_wait.count("ld.global.v4") == 1


def test_code_of_finalize_does_not_grow_with_very_many_choices():
    few, many = (launches_of_finalize(2, 2048, torch.bfloat16, 90, top_k).launches[0].report for top_k in (33, 512))
    assert few.count("ld.global") == many.count("ld.global") <= 16
    assert many.spill_bytes == 0
