"""What ptxas makes of Hopper's dgrad of gemm2, and of the gemm1 that keeps: no spills, wgmma that overlaps, copies that are asynchronous."""

from __future__ import annotations

import pytest
import torch
from emulation.offline_driver import Launch, offline_gpu
from gemm.hopper.cases import permutation_of_counts
from gemm.hopper.offline import NUM_SMS, assert_overlaps_without_spills, empty

from moe.flow import SwigluParams, TopK
from moe.gemm.config import GemmConfig, WeightFormat

pytest.importorskip("triton")
from triton import knobs

from moe.gemm.backward.hopper_dgrad import launch_hopper_gemm2_dgrad
from moe.gemm.wide.gemm1 import launch_wide_gemm1

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter")

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 2048, 768, 4


def configs(order: str) -> tuple[GemmConfig, GemmConfig]:
    shared = {"num_experts": NUM_EXPERTS, "weight_format": WeightFormat(gate_up_order=order)}
    gemm1 = GemmConfig(in_features=HIDDEN, out_features=INTERMEDIATE, activation="Swiglu", **shared)
    return gemm1, GemmConfig(in_features=INTERMEDIATE, out_features=HIDDEN, **shared)


def assert_is_tight(launch: Launch) -> None:
    assert_overlaps_without_spills(launch)
    # Two consumers, two loops of four.
    assert launch.report.count("wgmma.mma_async.sync.aligned.m64n256k16") == 16
    assert launch.report.count("cp.async.cg.shared.global") == 8  # 16 bytes each
    assert launch.report.count("cp.async.ca.shared.global") == 0
    assert launch.grid == (NUM_SMS, 1, 1)


@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("has_parameters", [False, True], ids=["plain", "parameters"])
def test_dgrad_compiles_without_spills_or_serialised_wgmma(has_parameters, order):
    gemm1, gemm2 = configs(order)
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    swiglu = SwigluParams(*(torch.ones(NUM_EXPERTS) for _ in range(3))) if has_parameters else None
    topk = TopK(torch.zeros(6, 1, dtype=torch.int32), torch.zeros(6, 1))
    gate_up = empty(permutation.max_rows, 2 * INTERMEDIATE)
    tensors = (empty(6, HIDDEN), empty(*gemm2.weight_shape), gate_up, topk, permutation)
    with offline_gpu(90) as gpu:
        grads = launch_hopper_gemm2_dgrad(*tensors, config=gemm2, gemm1=gemm1, swiglu=swiglu)
    assert grads.grad_gate_up.shape == gate_up.shape
    names = ["plan_units_kernel", "weigh_rows_kernel", "hopper_gemm2_dgrad_kernel", "sum_of_slots_kernel"]
    assert [launch.name for launch in gpu.launches] == names
    assert_is_tight(gpu.launches[-2])


def test_gemm1_that_keeps_compiles_without_spills_or_serialised_wgmma():
    gemm1, _ = configs("gate_up")
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    kept = empty(permutation.max_rows, 2 * INTERMEDIATE)
    with offline_gpu(90) as gpu:
        launch_wide_gemm1(empty(6, HIDDEN), empty(*gemm1.weight_shape), permutation, config=gemm1, kept=kept)
    assert_is_tight(gpu.launches[-1])
