"""What ptxas makes of Hopper's weight gradients: no spills, wgmma that overlaps, copies that are asynchronous."""

from __future__ import annotations

import pytest
import torch
from emulation.offline_driver import Launch, offline_gpu
from gemm.hopper.cases import permutation_of_counts
from gemm.hopper.offline import NUM_SMS, assert_overlaps_without_spills, empty

from moe.gemm.config import GemmConfig, WeightFormat

pytest.importorskip("triton")
from triton import knobs

from moe.gemm.backward.hopper_wgrad import launch_hopper_gemm1_wgrad, launch_hopper_gemm2_wgrad

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter")

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 2048, 768, 4


def configs(layout: str = "MajorK", order: str = "gate_up") -> tuple[GemmConfig, GemmConfig]:
    shared = {"num_experts": NUM_EXPERTS, "weight_format": WeightFormat(layout=layout, gate_up_order=order)}
    gemm1 = GemmConfig(in_features=HIDDEN, out_features=INTERMEDIATE, activation="Swiglu", **shared)
    return gemm1, GemmConfig(in_features=INTERMEDIATE, out_features=HIDDEN, **shared)


def assert_is_tight(launch: Launch) -> None:
    assert_overlaps_without_spills(launch)
    # Two consumers, two loops of four.
    assert launch.report.count("wgmma.mma_async.sync.aligned.m64n256k16") == 16
    assert launch.report.count("cp.async.cg.shared.global") == 8  # 16 bytes each
    assert launch.report.count("cp.async.ca.shared.global") == 0
    assert launch.grid == (NUM_SMS, 1, 1)


@pytest.mark.parametrize("is_sum", [False, True], ids=["bf16", "added"])
@pytest.mark.parametrize("layout", ["MajorK", "MajorMn"])
@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_weight_gradients_compile_without_spills_or_serialised_wgmma(stage, layout, is_sum):
    gemm1, gemm2 = configs(layout)
    permutation = permutation_of_counts([5000, 0, 700, 64], 128, 6)
    tokens = empty(6, HIDDEN)
    with offline_gpu(90) as gpu:
        if stage == "gemm1":
            out = torch.empty(gemm1.weight_shape) if is_sum else None
            rows = empty(permutation.max_rows, 2 * INTERMEDIATE)
            grad = launch_hopper_gemm1_wgrad(rows, tokens, permutation, config=gemm1, out=out)
        else:
            out = torch.empty(gemm2.weight_shape) if is_sum else None
            rows = empty(permutation.max_rows, INTERMEDIATE)
            grad = launch_hopper_gemm2_wgrad(tokens, rows, permutation, config=gemm2, out=out)
    assert grad.shape == (gemm1 if stage == "gemm1" else gemm2).weight_shape
    assert [launch.name for launch in gpu.launches] == ["rows_of_experts_kernel", "hopper_wgrad_kernel"]
    assert_is_tight(gpu.launches[-1])
