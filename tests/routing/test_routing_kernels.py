"""The table of routers: who runs for which config and device, and that checks are made once."""

import subprocess
import sys

import pytest
import torch

from moe.routing.config import RoutingConfig
from moe.routing.kernels import router_for, routers_on
from moe.routing.reference import select_experts_reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = RoutingConfig(num_experts=8, top_k=2)
TOO_MANY_EXPERTS = RoutingConfig(num_experts=2049, top_k=2)
TOO_MANY_CHOICES = RoutingConfig(num_experts=64, top_k=33)


def test_the_reference_runs_where_there_is_no_gpu():
    checked, unchecked = router_for(CONFIG, CPU, uses_pdl=True)
    assert checked is unchecked
    assert (checked.func, checked.keywords) == (select_experts_reference, {"config": CONFIG})


def test_the_table_of_a_cpu_loads_no_kernel_compiler():
    code = (
        "import sys, torch\n"
        "from moe.routing.kernels import routers_on\n"
        "names = [kernel.name for kernel in routers_on(torch.device('cpu'))]\n"
        "print(names, [name for name in ('triton', 'numba') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['reference'] []"


@pytest.mark.parametrize("uses_pdl", [False, True])
def test_a_gpu_routes_by_the_kernel_where_it_takes_the_config_and_else_by_the_reference(uses_pdl):
    pytest.importorskip("numba.cuda")
    from moe.routing.topk import launch_select_experts, select_experts

    assert [kernel.name for kernel in routers_on(CUDA)] == ["numba", "reference"]
    routers = router_for(CONFIG, CUDA, uses_pdl=uses_pdl)
    assert [router.func for router in routers] == [select_experts, launch_select_experts]
    assert [router.keywords for router in routers] == [{"config": CONFIG, "uses_pdl": uses_pdl}] * 2
    for config in (TOO_MANY_EXPERTS, TOO_MANY_CHOICES):
        checked, unchecked = router_for(config, CUDA, uses_pdl=uses_pdl)
        assert checked is unchecked
        assert (checked.func, checked.keywords) == (select_experts_reference, {"config": config})


def test_a_router_checks_once_and_its_launch_does_not(monkeypatch):
    pytest.importorskip("numba.cuda")
    checked = []
    monkeypatch.setattr(RoutingConfig, "check", lambda config, *tensors: checked.append(tensors))
    with_checks, without = router_for(CONFIG, CUDA, uses_pdl=False)
    logits = torch.empty(0, 8)  # nothing to launch
    assert without(logits).expert_ids.shape == (0, 2)
    assert checked == []
    assert with_checks(logits).expert_ids.shape == (0, 2)
    assert checked == [(logits, None, None)]


def test_tensors_are_refused_before_the_config():
    pytest.importorskip("numba.cuda")
    from moe.routing.topk import select_experts

    with pytest.raises(ValueError, match=r"routing_logits dim1 must match num_experts\."):
        select_experts(torch.zeros(1, 8), config=TOO_MANY_CHOICES)
    with pytest.raises(ValueError, match=r"num_experts <= 2048 and top_k <= 32, got .*num_experts=64, top_k=33"):
        select_experts(torch.zeros(1, 64), config=TOO_MANY_CHOICES)
