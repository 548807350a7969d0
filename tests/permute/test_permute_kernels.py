"""The tables of planners and finalizers: who runs for which config and device, and that checks are made once."""

import subprocess
import sys

import pytest
import torch

from moe.flow import TopK, UnitSize
from moe.permute.config import FinalizeConfig, PermuteConfig
from moe.permute.kernels import finalizer_for, finalizers_on, permuter_for, planner_of, planners_on
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = PermuteConfig(num_experts=8, num_local_experts=8, top_k=2)
TOO_MANY = PermuteConfig(num_experts=2049, num_local_experts=2049, top_k=2)


def no_units(device: torch.device, tile_rows: int, mean_rows: int) -> UnitSize | None:
    return None


def chosen(num_tokens: int) -> TopK:
    return TopK(torch.zeros(num_tokens, 2, dtype=torch.int32), torch.zeros(num_tokens, 2))


def test_the_references_run_where_there_is_no_gpu():
    planners = permuter_for(CONFIG, CPU, uses_pdl=True, unit_size=no_units)
    finalizers = finalizer_for(FinalizeConfig(), CPU, uses_pdl=True)
    for pair, reference in ((planners, plan_permutation_reference), (finalizers, finalize_tokens_reference)):
        assert pair[0] is pair[1]
        assert pair[0].func is reference
        assert list(pair[0].keywords) == ["config"]


def test_the_tables_of_a_cpu_load_no_kernel_compiler():
    code = (
        "import sys, torch\n"
        "from moe.permute.kernels import finalizers_on, planners_on\n"
        "names = [kernel.name for table in (planners_on, finalizers_on) for kernel in table(torch.device('cpu'))]\n"
        "print(names, [name for name in ('triton', 'numba') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['reference', 'reference'] []"


def test_a_gpu_has_a_planner_for_every_config():
    pytest.importorskip("triton")
    assert [kernel.name for kernel in planners_on(CUDA)] == ["numba", "triton"]
    assert [kernel.name for kernel in finalizers_on(CUDA)] == ["triton"]
    assert [planner_of(config, CUDA).name for config in (CONFIG, TOO_MANY)] == ["numba", "triton"]


@pytest.mark.parametrize("uses_pdl", [False, True])
def test_a_stage_gets_the_choices_that_it_takes(uses_pdl):
    pytest.importorskip("triton")
    from moe.permute import finalize, numba_plan, triton_plan

    by_numba = permuter_for(CONFIG, CUDA, uses_pdl=uses_pdl, unit_size=no_units)
    assert [stage.func for stage in by_numba] == [
        numba_plan.numba_plan_permutation,
        numba_plan.launch_numba_plan_permutation,
    ]
    keywords = {"config": CONFIG, "uses_pdl": uses_pdl, "unit_size": no_units}
    assert [stage.keywords for stage in by_numba] == [keywords] * 2

    by_triton = permuter_for(TOO_MANY, CUDA, uses_pdl=uses_pdl, unit_size=no_units)
    assert [stage.func for stage in by_triton] == [triton_plan.plan_permutation, triton_plan.launch_plan_permutation]
    assert [stage.keywords for stage in by_triton] == [{"config": TOO_MANY}] * 2

    config = FinalizeConfig(block_h=256)
    finalizers = finalizer_for(config, CUDA, uses_pdl=uses_pdl)
    assert [stage.func for stage in finalizers] == [finalize.finalize_tokens, finalize.launch_finalize_tokens]
    assert [stage.keywords for stage in finalizers] == [{"config": config, "uses_pdl": uses_pdl}] * 2


@pytest.mark.parametrize("config", [CONFIG, TOO_MANY], ids=["numba", "triton"])
def test_a_planner_checks_once_and_its_launch_does_not(config, monkeypatch):
    pytest.importorskip("triton")
    checked = []
    monkeypatch.setattr(PermuteConfig, "check", lambda config, topk: checked.append(topk))
    with_checks, without = permuter_for(config, CUDA, uses_pdl=False, unit_size=None)
    topk = chosen(0)  # nothing to launch
    assert without(topk).row_of_slot.shape == (0, 2)
    assert checked == []
    assert with_checks(topk).row_of_slot.shape == (0, 2)
    assert checked == [topk]


def test_units_are_asked_for_once_a_load():
    pytest.importorskip("numba.cuda")
    from moe.permute.numba_plan import _load_of

    asked = []

    def units(*load: object) -> UnitSize:
        asked.append(load)
        return UnitSize(40, 8, 3)

    loads = [_load_of(CONFIG, num_tokens, CPU, units, False) for num_tokens in (3, 3, 0, 5, 3)]
    assert asked == [(CPU, 16, 1), (CPU, 16, 2)]
    assert loads[0] is loads[1] is loads[4]
    assert [load.num_slots for load in loads] == [6, 6, 0, 10, 6]
    assert loads[2].kernels == ()


def test_a_finalizer_checks_once_and_its_launch_does_not(monkeypatch):
    pytest.importorskip("triton")
    checked = []
    monkeypatch.setattr(FinalizeConfig, "check", lambda config, *tensors: checked.append(tensors))
    topk = chosen(0)
    permutation = plan_permutation_reference(topk, config=CONFIG)
    rows, output = torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(0, 64, dtype=torch.bfloat16)
    with_checks, without = finalizer_for(FinalizeConfig(), CUDA, uses_pdl=False)
    assert without(rows, topk, permutation, output=output) is output
    assert checked == []
    assert with_checks(rows, topk, permutation, output=output) is output
    assert checked == [(rows, topk, permutation, output, None)]  # nothing is added


def test_tensors_are_refused_before_the_config():
    pytest.importorskip("numba.cuda")
    from moe.permute.numba_plan import numba_plan_permutation

    wrong = TopK(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expert_indices must be int32\."):
        numba_plan_permutation(wrong, config=TOO_MANY)
    with pytest.raises(ValueError, match="expected num_local_experts <= 2048, got num_local_experts=2049"):
        numba_plan_permutation(chosen(0), config=TOO_MANY)
