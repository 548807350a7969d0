"""A transformers model whose experts its own parallelism splits over two processes; every rank runs every case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.test_huggingface import build_model, experts_in, tokens_for
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from moe.integrations.huggingface import check_model, use_moe
from moe.testing.closeness import relative_error

SETTINGS = {"num_experts": 8, "moe_intermediate_size": 32}
EXPERT_STYLES = {"gate_up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}
TENSOR_STYLES = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "": "moe_tp_experts"}


def small_model() -> nn.Module:
    return build_model("qwen3_moe", **SETTINGS)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens_for(torch.device("cpu"))).logits


def plan_of(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    modules = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    return {f"{name}.{weights}".rstrip("."): style for name in modules for weights, style in styles.items()}


def check_split(model: nn.Module, shape: tuple[int, ...], wanted: Tensor) -> None:
    """Raise unless the model, whose weights are DTensors of this local shape, runs on us and gives what it is to give."""
    for experts in experts_in(model):
        assert isinstance(experts.gate_up_proj, DTensor)
        assert experts.gate_up_proj.to_local().shape == shape
    use_moe(model)
    check_model(model)
    assert relative_error(logits_of(model), wanted) <= 1e-2
    check_model(model)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def check_experts_split(implementation: str) -> None:
    wanted = logits_of(use_moe(small_model()))
    model = small_model()
    plan = plan_of(model, EXPERT_STYLES)
    apply_expert_parallelism(model, mesh(), mesh(), plan, ep_implementation=implementation)
    check_split(model, (4, 64, 64), wanted)


def experts_split_as_transformers_chooses(world: Any) -> None:
    check_experts_split("auto")


def experts_split_with_an_all_reduce(world: Any) -> None:
    check_experts_split("all_reduce")


def experts_split_with_an_all_to_all(world: Any) -> None:
    check_experts_split("all_to_all")


def each_expert_split_by_tensor_parallelism(world: Any) -> None:
    wanted = logits_of(use_moe(small_model()))
    model = small_model()
    apply_tensor_parallelism(model, mesh(), plan_of(model, TENSOR_STYLES))
    check_split(model, (8, 32, 64), wanted)


def parts_that_no_kernel_takes_are_refused(world: Any) -> None:
    model = build_model("qwen3_moe", num_experts=8, moe_intermediate_size=24)  # 12 a rank
    apply_tensor_parallelism(model, mesh(), plan_of(model, TENSOR_STYLES))
    with pytest.raises(ValueError, match=r"multiples of 8, got down_proj \[8, 64, 12\]"):
        use_moe(model)


def weights_split_by_nobody_who_gathers_them_are_refused(world: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = small_model()
    for experts in experts_in(model):
        experts.gate_up_proj = nn.Parameter(distribute_tensor(experts.gate_up_proj.data, mesh(), [Shard(0)]))
    with pytest.raises(ValueError, match=r"gate_up_proj or up_proj. to be a plain tensor, got (DTensor|Parameter)"):
        use_moe(model)


CASES = {
    case.__name__: case
    for case in (
        experts_split_as_transformers_chooses,
        experts_split_with_an_all_reduce,
        experts_split_with_an_all_to_all,
        each_expert_split_by_tensor_parallelism,
        parts_that_no_kernel_takes_are_refused,
        weights_split_by_nobody_who_gathers_them_are_refused,
    )
}
