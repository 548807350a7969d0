"""The host code's real launches, compiled for GPUs that are not here: registers, shared memory, instructions."""

from __future__ import annotations

import os

import pytest
import torch
from emulation.gpu_limits import SHARED_LIMIT_OF_ARCH
from gemm.cases import format_id
from gemm.family import activations_of

from moe.flow import Permutation, SwigluParams
from moe.gemm.config import FLASHINFER, GemmConfig, GemmTile, WeightFormat

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from emulation.offline_driver import Launch, offline_gpu, unallocated

import moe.gemm.portable.tile
from moe.gemm.portable.gemm1 import portable_gemm1
from moe.gemm.portable.gemm2 import portable_gemm2
from moe.gemm.portable.tile import candidate_tiles

MAJOR_K, MAJOR_MN = WeightFormat(), WeightFormat(layout="MajorMn")
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 128, 2048, 768
PREFETCH = "cp.async.bulk.prefetch.L2.global"


def compile_gemm(
    arch: int,
    tile_rows: int,
    weight_format: WeightFormat,
    *,
    is_gemm1: bool,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    tile: GemmTile | None = None,
    swiglu: SwigluParams | None = None,
    num_tiles: int = NUM_EXPERTS,
    mean_rows: int = 0,
    uses_pdl: bool = False,
    activation: str = "Swiglu",
    bias_dtype: torch.dtype | None = None,
) -> Launch:
    """The one launch of a gemm1 or of a gemm2, NUM_EXPERTS experts."""
    max_rows, num_tokens = num_tiles * tile_rows, 16
    permutation = Permutation(
        row_of_slot=unallocated(num_tokens, 8, dtype=torch.int32),
        token_of_row=unallocated(max_rows, dtype=torch.int32),
        expert_of_tile=unallocated(num_tiles, dtype=torch.int32),
        row_limit_of_tile=unallocated(num_tiles, dtype=torch.int32),
        num_rows=unallocated(1, dtype=torch.int32),
        num_tiles=unallocated(1, dtype=torch.int32),
        tile_rows=tile_rows,
        mean_rows=mean_rows,
    )
    config = GemmConfig(
        num_experts=NUM_EXPERTS,
        in_features=hidden if is_gemm1 else intermediate,
        out_features=intermediate if is_gemm1 else hidden,
        activation=activation if is_gemm1 else None,
        weight_format=weight_format,
        tile=tile,
    )
    weights = unallocated(*config.weight_shape)
    more = {"config": config, "uses_pdl": uses_pdl}
    if bias_dtype is not None:
        more["bias"] = unallocated(NUM_EXPERTS, config.weight_rows, dtype=bias_dtype)
    with offline_gpu(arch) as gpu:
        if is_gemm1:
            out = portable_gemm1(unallocated(num_tokens, hidden), weights, permutation, swiglu=swiglu, **more)
        else:
            out = portable_gemm2(unallocated(max_rows, intermediate), weights, permutation, **more)
    assert out.shape == (max_rows, config.out_features)
    (launch,) = gpu.launches
    return launch


def assert_loads_and_stores_16_bytes(launch: Launch) -> None:
    report = launch.report
    assert report.count("cp.async.cg") > 0
    # bf16 that is loaded without cp.async would be loads of 16 bits; row, tile and expert indices are 32 bits.
    assert report.count("ld.global.b16") == 0
    # A program of 16 rows and 32 columns has 8 bytes a thread to store.
    assert report.count("st.global") == report.count("st.global.v4") + report.count("st.global.v2.b32")


CASES_BY_ARCH = [
    *((90, tile_rows, weight_format) for tile_rows in (16, 32, 64, 128) for weight_format in (MAJOR_K, FLASHINFER)),
    *((90, tile_rows, MAJOR_MN) for tile_rows in (16, 128)),
    *((arch, tile_rows, FLASHINFER) for arch in (80, 100) for tile_rows in (16, 128)),
    (89, 128, FLASHINFER),
    (120, 128, FLASHINFER),
]


@pytest.mark.parametrize("is_gemm1", [True, False], ids=["gemm1", "gemm2"])
@pytest.mark.parametrize(
    ("arch", "tile_rows", "weight_format"),
    CASES_BY_ARCH,
    ids=[f"sm{arch}-{rows}rows-{format_id(weight_format)}" for arch, rows, weight_format in CASES_BY_ARCH],
)
def test_default_tiles_spill_nothing_and_fit(monkeypatch, arch, tile_rows, weight_format, is_gemm1):
    monkeypatch.setattr(moe.gemm.portable.tile, "shared_memory_limit", lambda device: SHARED_LIMIT_OF_ARCH[arch])
    launch = compile_gemm(arch, tile_rows, weight_format, is_gemm1=is_gemm1)
    assert launch.report.spill_bytes == 0
    assert launch.report.fits
    assert_loads_and_stores_16_bytes(launch)
    tensor_core = "tcgen05.mma" if arch == 100 else "wgmma.mma_async" if arch == 90 else "mma.sync"
    assert launch.report.count(tensor_core if tile_rows >= 64 else "mma.sync") > 0


@pytest.mark.parametrize("is_gemm1", [True, False], ids=["gemm1", "gemm2"])
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_deep_tiles_of_odd_contractions_spill_nothing_and_fit(tile_rows, is_gemm1):
    launch = compile_gemm(90, tile_rows, MAJOR_K, is_gemm1=is_gemm1, hidden=2880, intermediate=1856)
    assert launch.report.spill_bytes == 0
    assert launch.report.fits
    assert_loads_and_stores_16_bytes(launch)


@pytest.mark.parametrize("tile_rows", [16, 128])
def test_candidate_tiles_spill_nothing_and_fit(tile_rows):
    config = GemmConfig(
        num_experts=NUM_EXPERTS,
        in_features=HIDDEN,
        out_features=INTERMEDIATE,
        activation="Swiglu",
        weight_format=FLASHINFER,
    )
    for tile in candidate_tiles(config, tile_rows)[1:]:
        launch = compile_gemm(90, tile_rows, FLASHINFER, is_gemm1=True, tile=tile)
        assert launch.report.spill_bytes == 0, tile
        assert launch.report.fits, tile
        assert launch.options["num_warps"] == tile.num_warps


@pytest.mark.parametrize("weight_format", [MAJOR_K, MAJOR_MN], ids=format_id)
def test_ragged_dims_load_16_bytes_too(weight_format):
    # 1096 and 1000 are multiples of 8 and of no more.
    launch = compile_gemm(90, 64, weight_format, is_gemm1=True, hidden=1096, intermediate=1000)
    assert launch.report.spill_bytes == 0
    assert_loads_and_stores_16_bytes(launch)


def test_the_grid_covers_the_upper_bound_of_tiles_and_every_column():
    launch = compile_gemm(90, 128, MAJOR_K, is_gemm1=True)
    columns_of_program = 128
    assert launch.grid == (NUM_EXPERTS * INTERMEDIATE // columns_of_program, 1, 1)


def test_swiglu_parameters_cost_no_spills():
    parameter = unallocated(NUM_EXPERTS, dtype=torch.float32)
    swiglu = SwigluParams(alpha=parameter, beta=parameter, clamp_limit=parameter)
    launch = compile_gemm(90, 128, FLASHINFER, is_gemm1=True, swiglu=swiglu)
    assert launch.report.spill_bytes == 0


@pytest.mark.parametrize("activation", [name for name in activations_of("portable") if name != "Swiglu"])
def test_no_activation_costs_spills(activation):
    launch = compile_gemm(90, 128, MAJOR_K, is_gemm1=True, activation=activation)
    assert launch.report.spill_bytes == 0
    assert_loads_and_stores_16_bytes(launch)


@pytest.mark.parametrize("is_gemm1", [True, False], ids=["gemm1", "gemm2"])
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize(
    ("arch", "bias_dtype", "order"),
    [(80, torch.bfloat16, "gate_up"), (90, torch.bfloat16, "interleaved"), (90, torch.float32, "gate_up")],
    ids=["sm80-bf16-halves", "sm90-bf16-interleaved", "sm90-fp32-halves"],
)
def test_layers_with_biases_spill_nothing_and_load_16_bytes(monkeypatch, arch, bias_dtype, order, tile_rows, is_gemm1):
    # gpt-oss: MajorMn, where neighbouring rows are neighbours in memory.
    monkeypatch.setattr(moe.gemm.portable.tile, "shared_memory_limit", lambda device: SHARED_LIMIT_OF_ARCH[arch])
    weight_format = WeightFormat(layout="MajorMn", gate_up_order=order)
    parameter = unallocated(NUM_EXPERTS, dtype=torch.float32)
    swiglu = SwigluParams(alpha=parameter, beta=parameter, clamp_limit=parameter)
    dims = {"hidden": 2880, "intermediate": 2880}
    launch = compile_gemm(
        arch, tile_rows, weight_format, is_gemm1=is_gemm1, swiglu=swiglu, bias_dtype=bias_dtype, **dims
    )
    assert launch.report.spill_bytes == 0
    assert launch.report.fits
    assert launch.report.count("cp.async.cg") > 0


@pytest.mark.parametrize(("arch", "mean_rows"), [(90, 1), (90, 2), (100, 2), (120, 2)])
def test_a_dependent_gemm1_asks_for_weights_before_it_waits_if_every_expert_has_rows(monkeypatch, arch, mean_rows):
    monkeypatch.setattr(moe.gemm.portable.tile, "shared_memory_limit", lambda device: SHARED_LIMIT_OF_ARCH[arch])
    launch = compile_gemm(arch, 16, MAJOR_K, is_gemm1=True, mean_rows=mean_rows, uses_pdl=True)
    before_wait, after_wait = launch.report.ptx.split("griddepcontrol.wait")
    assert before_wait.count(PREFETCH) == (mean_rows == 2)
    assert PREFETCH not in after_wait
    assert "ld.global" not in before_wait
    assert launch.report.spill_bytes == 0


def test_gemm1_asks_for_no_weights_where_launches_are_plain_or_there_are_few():
    plain = compile_gemm(90, 16, MAJOR_K, is_gemm1=True, mean_rows=8)
    small = compile_gemm(90, 16, MAJOR_K, is_gemm1=True, mean_rows=8, uses_pdl=True, hidden=128, intermediate=128)
    assert PREFETCH not in plain.report.ptx
    assert PREFETCH not in small.report.ptx


@pytest.mark.parametrize(
    ("tile_rows", "num_tiles", "is_dependent"),
    # Two programs of (16 + 64) * 128 * 2 bytes in four stages fit on each of 132 multiprocessors; of the last kind one does.
    [(16, 32, False), (16, 33, True), (128, 1, True)],
)
def test_gemm2_is_a_dependent_launch_if_its_programs_spread_evenly(tile_rows, num_tiles, is_dependent):
    launch = compile_gemm(90, tile_rows, MAJOR_K, is_gemm1=False, num_tiles=num_tiles, uses_pdl=True)
    if tile_rows == 16:
        assert launch.grid[0] == num_tiles * HIDDEN // 64
        assert is_dependent == (launch.grid[0] >= 4 * 2 * 132)
    assert launch.options["launch_pdl"] == is_dependent
    assert launch.report.count("griddepcontrol.wait") == is_dependent
