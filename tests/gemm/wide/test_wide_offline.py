"""What ptxas makes of the wide GEMMs: no spills, wgmma that overlaps, copies that are asynchronous."""

import pytest
import torch
from emulation.offline_driver import Launch, offline_gpu
from gemm.hopper.cases import permutation_of_counts
from gemm.hopper.offline import NUM_SMS, assert_overlaps_without_spills, empty
from triton import knobs

from moe.flow import SwigluParams
from moe.gemm.config import FLASHINFER, ActivationType, GemmConfig, WeightFormat
from moe.gemm.wide.gemm1 import wide_gemm1
from moe.gemm.wide.gemm2 import wide_gemm2

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter")

FORMATS = {"huggingface": WeightFormat(), "flashinfer": FLASHINFER}


GPT_OSS = WeightFormat(layout="MajorMn", gate_up_order="interleaved")


def assert_is_tight(launch: Launch) -> None:
    assert_overlaps_without_spills(launch)
    # Two consumers, two loops of four.
    assert launch.report.count("wgmma.mma_async.sync.aligned.m64n256k16") >= 16
    assert launch.report.count("cp.async.bulk.tensor.") >= 6


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_gemm1_compiles_without_spills_or_serialised_wgmma(weight_format):
    config = GemmConfig(
        num_experts=4,
        in_features=2048,
        out_features=768,
        activation=ActivationType.Swiglu,
        weight_format=weight_format,
    )
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    with offline_gpu(arch=90) as gpu:
        out = wide_gemm1(empty(6, 2048), empty(*config.weight_shape), permutation, config=config)
    launch = gpu.launches[-1]
    assert out.shape == (permutation.max_rows, 768)
    assert launch.grid == (NUM_SMS, 1, 1)
    assert_is_tight(launch)
    assert launch.report.count("cp.async.cg.shared.global") == 8  # 16 bytes each
    assert launch.report.count("cp.async.ca.shared.global") == 0


def test_gemm1_with_a_ragged_contraction_and_swiglu_parameters_compiles_alike():
    config = GemmConfig(num_experts=2, in_features=200, out_features=104, activation=ActivationType.Swiglu)
    permutation = permutation_of_counts([70, 200], 64, 9)
    parameters = SwigluParams(*(torch.ones(2) for _ in range(3)))
    with offline_gpu(arch=90) as gpu:
        wide_gemm1(empty(9, 200), empty(*config.weight_shape), permutation, config=config, swiglu=parameters)
    assert_is_tight(gpu.launches[-1])
    assert gpu.launches[-1].report.count("cp.async.cg.shared.global") == 8


@pytest.mark.parametrize("order", ["gate_up", "interleaved"])
def test_gemm1_of_weights_along_their_rows_with_swiglu_parameters_compiles_alike(order):
    weight_format = WeightFormat(layout="MajorMn", gate_up_order=order)
    config = GemmConfig(
        num_experts=2, in_features=2048, out_features=768, activation="Swiglu", weight_format=weight_format
    )
    permutation = permutation_of_counts([700, 64], 128, 6)
    parameters = SwigluParams(*(torch.ones(2) for _ in range(3)))
    with offline_gpu(arch=90) as gpu:
        wide_gemm1(empty(6, 2048), empty(*config.weight_shape), permutation, config=config, swiglu=parameters)
    assert_is_tight(gpu.launches[-1])


def test_gemms_of_gpt_oss_compile_alike():
    """Interleaved MajorMn weights, and biases, which sums begin with."""
    up = GemmConfig(num_experts=2, in_features=2880, out_features=2880, activation="Swiglu", weight_format=GPT_OSS)
    down = GemmConfig(num_experts=2, in_features=2880, out_features=2880, weight_format=GPT_OSS)
    permutation = permutation_of_counts([700, 64], 128, 6)
    parameters = SwigluParams(*(torch.ones(2) for _ in range(3)))
    with offline_gpu(arch=90) as gpu:
        bias = empty(2, up.weight_rows)
        wide_gemm1(empty(6, 2880), empty(*up.weight_shape), permutation, config=up, swiglu=parameters, bias=bias)
        bias = torch.empty(2, down.weight_rows)
        wide_gemm2(empty(permutation.max_rows, 2880), empty(*down.weight_shape), permutation, config=down, bias=bias)
    for launch in gpu.launches:
        if "gemm" in launch.name:
            assert_is_tight(launch)


@pytest.mark.parametrize("activation", ["Relu2", "Gelu"])
def test_gemm1_of_other_activations_compiles_alike(activation):
    config = GemmConfig(num_experts=2, in_features=2048, out_features=768, activation=activation)
    permutation = permutation_of_counts([700, 64], 128, 6)
    with offline_gpu(arch=90) as gpu:
        bias = torch.empty(2, config.weight_rows)
        wide_gemm1(empty(6, 2048), empty(*config.weight_shape), permutation, config=config, bias=bias)
    assert_is_tight(gpu.launches[-1])


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_gemm2_compiles_without_spills_or_serialised_wgmma(weight_format):
    config = GemmConfig(num_experts=4, in_features=768, out_features=2048, weight_format=weight_format)
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    with offline_gpu(arch=90) as gpu:
        rows = empty(permutation.max_rows, 768)
        out = wide_gemm2(rows, empty(*config.weight_shape), permutation, config=config)
    assert out.shape == (permutation.max_rows, 2048)
    assert gpu.launches[-1].grid == (NUM_SMS, 1, 1)
    assert_is_tight(gpu.launches[-1])


@pytest.mark.parametrize("uses_pdl", [False, True], ids=["alone", "dependent"])
def test_every_launch_of_a_dependent_chain_waits_and_triggers_once(uses_pdl):
    gate = GemmConfig(num_experts=4, in_features=2048, out_features=768, activation=ActivationType.Swiglu)
    down = GemmConfig(num_experts=4, in_features=768, out_features=2048)
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    with offline_gpu(arch=90) as gpu:
        rows = wide_gemm1(empty(6, 2048), empty(*gate.weight_shape), permutation, config=gate, uses_pdl=uses_pdl)
        wide_gemm2(rows, empty(*down.weight_shape), permutation, config=down, uses_pdl=uses_pdl)
    assert len(gpu.launches) == 4  # units, gemm1, units, gemm2
    for launch in gpu.launches:
        assert bool(launch.options.get("launch_pdl")) == uses_pdl
        assert launch.report.count("griddepcontrol.wait") == launch.report.count("griddepcontrol.launch") == uses_pdl
    assert_is_tight(gpu.launches[1])
    assert_is_tight(gpu.launches[3])
