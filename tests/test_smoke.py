"""Every kernel once, in the mode that runs it: `make smoke`, in a minute or two. What is wrong with one all over shows here."""

import ast
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe
from moe import MoEConfig, reference_pipeline
from moe.fused.few_tokens.config import FewTokenConfig
from moe.permute.config import PermuteConfig
from moe.permute.reference import plan_permutation_reference
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, make_problem, random_topk

LAYER = MoEConfig.create(hidden_size=128, intermediate_size=64, num_experts=8, top_k=2)
IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED_ONLY = {
    "swapped_gemm1_kernel",
    "swapped_gemm2_kernel",
    "wide_gemm1_kernel",
    "wide_gemm2_kernel",
    "hopper_wgrad_kernel",
    "hopper_gemm2_dgrad_kernel",
}
RUN = {
    *(
        "plan_kernel",
        "count_kernel",
        "scan_kernel",
        "place_kernel",
        "finalize_kernel",
        "topk_kernel",
        "plan_units_kernel",
        "route_backward_kernel",
        "map_ids_kernel",
    ),
    *("portable_gemm2_dgrad_kernel", "portable_wgrad_kernel"),
    *("rows_of_experts_kernel", "weigh_rows_kernel", "sum_of_slots_kernel"),
    *("portable_gemm1_kernel", "portable_gemm2_kernel", "few_token_gemm1_kernel", "few_token_gemm2_finalize_kernel"),
}

if IS_SIMULATED:
    import emulation.numba_launch  # noqa: F401


def test_no_kernel_is_left_out():
    package = Path(moe.__file__).parent
    # Those of an exchange between ranks have quick tests of their own, which `make smoke` runs too.
    paths = [path for path in package.rglob("*_kernel.py") if path.parent.name != "parallel"]
    trees = [ast.parse(path.read_text()) for path in paths]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = {node.name for node in functions if node.name.endswith("_kernel") and not node.name.startswith("build_")}
    assert kernels == COMPILED_ONLY | RUN


def test_references_give_the_layer():
    problem = make_problem(LAYER, 9)
    pipeline = reference_pipeline(LAYER)
    topk = pipeline.route(problem.logits)
    exact = experts_in_float64(topk, problem.hidden_states, problem.w1, problem.w2)
    output = pipeline(problem.logits, problem.hidden_states, problem.w1, problem.w2)
    assert_close_to_exact(output, output, exact)


def test_the_portable_gemms_and_finalize_give_the_layer(triton_device, poisoned_memory):
    from moe.gemm.portable.gemm1 import portable_gemm1
    from moe.gemm.portable.gemm2 import portable_gemm2
    from moe.permute.finalize import finalize_tokens
    from moe.permute.triton_plan import plan_permutation

    problem = make_problem(LAYER, 9, device=triton_device)
    topk = random_topk(9, 8, 2, device=triton_device)
    permutation = plan_permutation(topk, config=LAYER.permute)
    activation = portable_gemm1(problem.hidden_states, problem.w1, permutation, config=LAYER.gemm1)
    rows = portable_gemm2(activation, problem.w2, permutation, config=LAYER.gemm2)
    output = finalize_tokens(rows, topk, permutation, config=LAYER.finalize)
    assert_is_the_layer(output, topk, problem)


def test_the_few_token_kernels_give_the_layer(triton_device, poisoned_memory):
    from moe.fused.few_tokens.experts import few_token_experts

    problem = make_problem(LAYER, 3, device=triton_device)
    topk = random_topk(3, 8, 2, device=triton_device)
    config = FewTokenConfig(num_experts=8, top_k=2, gemm1=LAYER.gemm1, gemm2=LAYER.gemm2)
    output = few_token_experts(topk, problem.hidden_states, problem.w1, problem.w2, config=config)
    assert_is_the_layer(output, topk, problem)


def assert_is_the_layer(output, topk, problem):
    tensors = topk, problem.hidden_states, problem.w1, problem.w2
    assert_close_to_exact(output, reference_pipeline(LAYER).run_experts(*tensors), experts_in_float64(*tensors))


@pytest.mark.parametrize("max_slots", [4096, 8], ids=["one-launch", "three-launches"])
def test_the_planner_in_triton_places_every_slot(triton_device, max_slots, monkeypatch):
    from moe.permute import triton_plan

    monkeypatch.setattr(triton_plan, "CHUNKING", replace(triton_plan.CHUNKING, max_slots_in_one_launch=max_slots))
    assert_plans_alike(triton_plan.plan_permutation, 5, 4, triton_device)


@pytest.mark.parametrize("max_slots", [16384, 8], ids=["one-launch", "two-launches"])
def test_the_planner_in_numba_places_every_slot(numba_device, max_slots, monkeypatch):
    from moe.permute import numba_plan

    monkeypatch.setattr(numba_plan, "CHUNKING", replace(numba_plan.CHUNKING, max_slots_in_one_launch=max_slots))
    assert_plans_alike(numba_plan.numba_plan_permutation, 5, 4, numba_device)


def assert_plans_alike(plan, num_tokens, top_k, device):
    config = PermuteConfig(num_experts=8, num_local_experts=8, top_k=top_k)
    topk = random_topk(num_tokens, 8, top_k, device=device)
    made, wanted = plan(topk, config=config), plan_permutation_reference(topk, config=config)
    assert torch.equal(made.row_of_slot, wanted.row_of_slot)
    assert (int(made.num_rows), int(made.num_tiles)) == (int(wanted.num_rows), int(wanted.num_tiles))


def test_routing_chooses_as_the_reference(numba_device):
    from moe.routing.reference import select_experts_reference
    from moe.routing.topk import select_experts

    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(numba_device)
    chosen, wanted = (select(logits, config=LAYER.routing) for select in (select_experts, select_experts_reference))
    assert torch.equal(chosen.expert_ids, wanted.expert_ids)


def test_the_routing_weights_gradient_is_the_references(triton_device):
    from moe.routing.backward import route_backward
    from moe.routing.backward_reference import route_backward_reference

    grads, logits = torch.ones(5, 2, device=triton_device), torch.eye(5, 8, device=triton_device)
    ids = torch.tensor([[0, 3]] * 5, dtype=torch.int32, device=triton_device)
    made, wanted = (run(grads, logits, ids, config=LAYER.routing) for run in (route_backward, route_backward_reference))
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("stage", ["gemm1_keeping", "gemm2_dgrad", "gemm1_dgrad", "gemm1_wgrad", "gemm2_wgrad"])
def test_the_portable_backward_stages_are_near_float64(triton_device, poisoned_memory, stage):
    from gemm.backward.stage_tests import assert_is_close, make_inputs
    from gemm.backward.test_portable_backward import STAGES

    dims = {"hidden_size": 128, "intermediate_size": 64}
    assert_is_close(STAGES, stage, make_inputs([5, 0, 17], triton_device, **dims))


@pytest.mark.skipif(IS_SIMULATED or IS_INTERPRETED, reason="an emulation compiles nothing")
@pytest.mark.parametrize("family", ["swapped", "wide"])
def test_the_hopper_gemms_compile(family):
    from emulation.offline_driver import offline_gpu
    from gemm.hopper.cases import permutation_of_counts
    from gemm.hopper.offline import empty

    from moe.gemm.swapped.gemm1 import swapped_gemm1
    from moe.gemm.swapped.gemm2 import swapped_gemm2
    from moe.gemm.wide.gemm1 import wide_gemm1
    from moe.gemm.wide.gemm2 import wide_gemm2

    gemm1, gemm2 = {"swapped": (swapped_gemm1, swapped_gemm2), "wide": (wide_gemm1, wide_gemm2)}[family]
    layer = MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=4, top_k=2)
    permutation = permutation_of_counts([70, 0, 9, 64], 64, 80)
    with offline_gpu(arch=90) as gpu:
        rows = gemm1(empty(80, 256), empty(*layer.gemm1.weight_shape), permutation, config=layer.gemm1)
        gemm2(rows, empty(*layer.gemm2.weight_shape), permutation, config=layer.gemm2)
    names = [launch.report.name for launch in gpu.launches]
    assert [name for name in names if family in name] == [f"{family}_gemm1_kernel", f"{family}_gemm2_kernel"]
    assert all(launch.report.spill_bytes == 0 for launch in gpu.launches)


@pytest.mark.skipif(IS_SIMULATED or IS_INTERPRETED, reason="an emulation compiles nothing")
def test_hoppers_weight_gradient_compiles():
    from emulation.offline_driver import offline_gpu
    from gemm.hopper.cases import permutation_of_counts
    from gemm.hopper.offline import empty

    from moe.gemm.backward.hopper_wgrad import launch_hopper_gemm2_wgrad

    layer = MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=4, top_k=2)
    permutation = permutation_of_counts([70, 0, 9, 64], 64, 80)
    with offline_gpu(arch=90) as gpu:
        launch_hopper_gemm2_wgrad(empty(80, 256), empty(permutation.max_rows, 128), permutation, config=layer.gemm2)
    assert gpu.launches[-1].name == "hopper_wgrad_kernel"
    assert all(launch.report.spill_bytes == 0 for launch in gpu.launches)


def test_units_are_planned(triton_device):
    from gemm.hopper.cases import permutation_of_counts

    from moe.gemm.hopper.work_units import plan_units, plan_units_reference
    from moe.gemm.wide.tile import WIDE_UNITS

    permutation = permutation_of_counts([70, 0, 9, 64], 64, 80, device=triton_device)
    made, wanted = plan_units(permutation, WIDE_UNITS), plan_units_reference(permutation, WIDE_UNITS)
    num_units = int(wanted.counts[0])
    assert made.counts.tolist() == wanted.counts.tolist()
    assert torch.equal(made.records[:, :num_units].cpu(), wanted.records[:, :num_units])
