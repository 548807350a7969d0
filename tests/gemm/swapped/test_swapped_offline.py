"""What ptxas makes of the swapped GEMMs: no spills, wgmma that overlaps, copies that are asynchronous."""

from dataclasses import replace

import pytest
import torch
from emulation.offline_driver import Launch, offline_gpu
from gemm.hopper.cases import permutation_of_counts
from gemm.hopper.offline import NUM_SMS, assert_overlaps_without_spills, empty
from triton import knobs

from moe.flow import SwigluParams
from moe.gemm.config import FLASHINFER, ActivationType, GemmConfig, WeightFormat
from moe.gemm.hopper.work_units import plan_units_reference
from moe.gemm.swapped.gemm1 import swapped_gemm1
from moe.gemm.swapped.gemm2 import swapped_gemm2
from moe.gemm.swapped.tile import SWAPPED_UNITS

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter")

COMPILED = {"huggingface-tile_rows16": (WeightFormat(), 16), "flashinfer-tile_rows64": (FLASHINFER, 64)}


GPT_OSS = WeightFormat(layout="MajorMn", gate_up_order="interleaved")


def assert_is_tight(launch: Launch) -> None:
    assert_overlaps_without_spills(launch)
    # Two consumers, 8 a loop; the loops for 64, 64 + 32 and 128, 128 + 32 tokens share an extent each, and 32 has three.
    for tokens, loops in {32: 3, 64: 2, 128: 2}.items():
        assert launch.report.count(f"wgmma.mma_async.sync.aligned.m64n{tokens}k16") == 2 * 8 * loops
    assert launch.report.count("stmatrix.sync.aligned.m8n8.x4.trans") > 0


@pytest.mark.parametrize(("weight_format", "tile_rows"), COMPILED.values(), ids=COMPILED)
def test_gemm1_compiles_without_spills_or_serialised_wgmma(weight_format, tile_rows):
    config = GemmConfig(
        num_experts=4,
        in_features=2048,
        out_features=768,
        activation=ActivationType.Swiglu,
        weight_format=weight_format,
    )
    permutation = permutation_of_counts([5000, 0, 700, 64], tile_rows, 6)
    with offline_gpu(arch=90) as gpu:
        out = swapped_gemm1(empty(6, 2048), empty(*config.weight_shape), permutation, config=config)
    launch = gpu.launches[-1]
    assert out.shape == (permutation.max_rows, 768)
    assert launch.grid == (NUM_SMS, 1, 1)
    assert_is_tight(launch)
    assert launch.report.count("cp.async.cg.shared.global") == 10  # 16 bytes each
    assert launch.report.count("cp.async.ca.shared.global") == 0


def test_gemm1_with_a_ragged_contraction_and_swiglu_parameters_compiles_alike():
    config = GemmConfig(num_experts=2, in_features=200, out_features=104, activation=ActivationType.Swiglu)
    permutation = permutation_of_counts([70, 200], 32, 9)
    parameters = SwigluParams(*(torch.ones(2) for _ in range(3)))
    with offline_gpu(arch=90) as gpu:
        swapped_gemm1(empty(9, 200), empty(*config.weight_shape), permutation, config=config, swiglu=parameters)
    assert_is_tight(gpu.launches[-1])
    assert gpu.launches[-1].report.count("cp.async.cg.shared.global") == 10


def test_gemms_of_gpt_oss_compile_alike():
    """Interleaved MajorMn weights, and biases, which sums begin with."""
    up = GemmConfig(num_experts=2, in_features=2880, out_features=2880, activation="Swiglu", weight_format=GPT_OSS)
    down = GemmConfig(num_experts=2, in_features=2880, out_features=2880, weight_format=GPT_OSS)
    permutation = permutation_of_counts([700, 64], 16, 6)
    parameters = SwigluParams(*(torch.ones(2) for _ in range(3)))
    with offline_gpu(arch=90) as gpu:
        bias = empty(2, up.weight_rows)
        swapped_gemm1(empty(6, 2880), empty(*up.weight_shape), permutation, config=up, swiglu=parameters, bias=bias)
        bias = torch.empty(2, down.weight_rows)
        swapped_gemm2(empty(permutation.max_rows, 2880), empty(*down.weight_shape), permutation, config=down, bias=bias)
    for launch in gpu.launches:
        if "gemm" in launch.name:
            assert_is_tight(launch)


@pytest.mark.parametrize("activation", ["Relu2", "Gelu"])
def test_gemm1_of_other_activations_compiles_alike(activation):
    config = GemmConfig(num_experts=2, in_features=2048, out_features=768, activation=activation)
    permutation = permutation_of_counts([700, 64], 16, 6)
    with offline_gpu(arch=90) as gpu:
        bias = torch.empty(2, config.weight_rows)
        swapped_gemm1(empty(6, 2048), empty(*config.weight_shape), permutation, config=config, bias=bias)
    assert_is_tight(gpu.launches[-1])


@pytest.mark.parametrize(("weight_format", "tile_rows"), COMPILED.values(), ids=COMPILED)
def test_gemm2_compiles_without_spills_or_serialised_wgmma(weight_format, tile_rows):
    config = GemmConfig(num_experts=4, in_features=768, out_features=2048, weight_format=weight_format)
    permutation = permutation_of_counts([5000, 0, 700, 64], tile_rows, 6)
    with offline_gpu(arch=90) as gpu:
        rows = empty(permutation.max_rows, 768)
        out = swapped_gemm2(rows, empty(*config.weight_shape), permutation, config=config)
    assert out.shape == (permutation.max_rows, 2048)
    assert gpu.launches[-1].grid == (NUM_SMS, 1, 1)
    assert_is_tight(gpu.launches[-1])


@pytest.mark.parametrize("has_units", [False, True], ids=["units_of_their_own", "units_of_the_planner"])
def test_dependent_gemms_compile_alike(has_units):
    gate = GemmConfig(num_experts=8, in_features=2048, out_features=256, activation=ActivationType.Swiglu)
    down = GemmConfig(num_experts=8, in_features=256, out_features=2048)
    permutation = replace(permutation_of_counts([5000, 0, 700, 64], 64, 6), mean_rows=64)
    if has_units:
        permutation = replace(permutation, units=plan_units_reference(permutation, SWAPPED_UNITS))
    with offline_gpu(arch=90) as gpu:
        rows = swapped_gemm1(empty(6, 2048), empty(*gate.weight_shape), permutation, config=gate, uses_pdl=True)
        swapped_gemm2(rows, empty(*down.weight_shape), permutation, config=down, uses_pdl=True)
    gemms = [launch for launch in gpu.launches if "gemm" in launch.name]
    assert len(gpu.launches) == (2 if has_units else 4)
    for launch in gemms:
        assert_is_tight(launch)
        assert launch.report.count("griddepcontrol.wait") == launch.report.count("griddepcontrol.launch") == 1
    # gemm1 asks for weights before it waits.
    prefetches = [
        "cp.async.bulk.prefetch.L2.global" in text for text in gemms[0].report.ptx.split("griddepcontrol.wait")
    ]
    assert prefetches == [True, False]
