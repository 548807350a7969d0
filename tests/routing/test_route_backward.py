"""The routing weights' gradient by logits: against differences of numbers, torch's autograd, and the kernel against both."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from routing.cases import GROUPED, METHODS, config_of
from torch import Tensor

from moe.routing.backward_reference import route_backward_reference
from moe.routing.config import RoutingConfig, RoutingMethod
from moe.routing.reference import _keys, _weights, select_experts_reference

CONFIGS = [config_of(method, 12, 4) for method in METHODS]
CONFIGS += [config_of(RoutingMethod.SIGMOID_RENORM, 12, 4, norm_topk_prob=False), GROUPED[3], GROUPED[4]]


def config_id(config: RoutingConfig) -> str:
    groups = f"-{config.n_group}_groups" if config.is_grouped else ""
    return f"{config.method.value}{groups}{'' if config.norm_topk_prob else '-not_renormalised'}"


def chosen_of(config: RoutingConfig, num_tokens: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Logits and the ids that the rule chooses under a random bias."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, config.num_experts, generator=generator)
    bias = torch.randn(config.num_experts, generator=generator) if config.method.uses_bias else None
    return logits, select_experts_reference(logits, bias, config=config).expert_ids


def weights_of(x: Tensor, expert_ids: Tensor, config: RoutingConfig) -> Tensor:
    """The rule's weights in the dtype of x, under torch's autograd."""
    is_expert = (expert_ids >= 0) & (expert_ids < config.num_experts)
    index = torch.where(is_expert, expert_ids, 0).long()
    chosen = x.gather(1, index).masked_fill(~is_expert, -torch.inf)
    keys = _keys(x, None, config).gather(1, index)
    return _weights(chosen, keys, config).masked_fill(~is_expert, 0.0)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, config: RoutingConfig) -> Tensor:
        ctx.kept = x, expert_ids, config
        return weights_of(x, expert_ids, config)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, expert_ids, config = ctx.kept
        return route_backward_reference(grad, x, expert_ids, config=config), None, None


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_gradcheck_in_float64(config: RoutingConfig) -> None:
    logits, ids = chosen_of(config, 5)
    if config.top_k > 1:
        ids[1, 1], ids[2, :] = -1, config.num_experts  # replayed ids that stand for no expert
        ids[3, 1] = ids[3, 0]  # and one that comes twice
    assert torch.autograd.gradcheck(_Weigh.apply, (logits.double().requires_grad_(), ids, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_the_kernel_gives_the_gradient(triton_device, poisoned_memory, config, dtype):
    from moe.routing.backward import route_backward

    for num_tokens in (0, 1, 7):
        logits, ids = chosen_of(config, num_tokens)
        logits = logits.to(dtype)
        grads = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
        if num_tokens == 7 and config.top_k > 1:
            ids[1, 1], ids[2, :] = -1, config.num_experts
            ids[3, 1] = ids[3, 0]
        x = logits.double().requires_grad_()
        (exact,) = torch.autograd.grad(weights_of(x, ids, config), x, grads.double(), materialize_grads=True)
        tensors = grads.to(triton_device), logits.to(triton_device), ids.to(triton_device)
        runs = [route_backward(*tensors, config=config) for _ in range(3)]
        assert all(torch.equal(runs[0], run) for run in runs)
        assert runs[0].dtype == dtype
        error = (runs[0].cpu().double() - exact).abs()
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert bool((error <= rounding * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("num_experts", [5, 300, 2048])
def test_the_kernel_takes_any_number_of_experts(triton_device, num_experts):
    from moe.routing.backward import route_backward

    for method in (RoutingMethod.DEFAULT, RoutingMethod.DEEPSEEK_V3):
        config = config_of(method, num_experts, 5)
        logits, ids = chosen_of(config, 3)
        grads = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
        tensors = grads.to(triton_device), logits.to(triton_device), ids.to(triton_device)
        wanted = route_backward_reference(grads, logits, ids, config=config)
        torch.testing.assert_close(route_backward(*tensors, config=config).cpu(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("config", [config_of(method, 256, 8) for method in METHODS], ids=config_id)
def test_the_kernel_compiles_without_spills(config, arch):
    pytest.importorskip("triton")
    from emulation.offline_driver import offline_gpu, unallocated

    from moe.routing.backward import route_backward

    ids = unallocated(7, config.top_k, dtype=torch.int32)
    grads, logits = unallocated(7, config.top_k, dtype=torch.float32), unallocated(7, 256, dtype=torch.bfloat16)
    with offline_gpu(arch=arch) as gpu:
        route_backward(grads, logits, ids, config=config)
    assert [launch.report.name for launch in gpu.launches] == ["route_backward_kernel"]
    assert gpu.launches[0].report.spill_bytes == 0


def test_logits_that_have_no_part_get_exact_zeros():
    config = config_of(RoutingMethod.DEEPSEEK_V3, 12, 4)
    logits, ids = chosen_of(config, 7)
    ones_and_twos = torch.tensor([[1.0, 1.0, 2.0, 2.0]] * 7)
    grads = route_backward_reference(ones_and_twos, logits, ids, config=config)
    is_chosen = torch.zeros(7, 12, dtype=torch.bool).scatter_(1, ids.long(), True)
    assert not grads[~is_chosen].any()
    assert grads[is_chosen].all()


def test_logits_so_low_that_all_sigmoids_underflow_give_finite_gradients():
    for method in METHODS:
        config = config_of(method, 12, 4)
        logits = torch.full((2, 12), -1e4)
        ids = torch.arange(config.top_k, dtype=torch.int32).expand(2, -1).contiguous()
        grads = route_backward_reference(torch.randn(2, config.top_k), logits, ids, config=config)
        assert grads.isfinite().all(), method


def test_tensors_that_do_not_fit_are_refused():
    config = config_of(RoutingMethod.DEFAULT, 12, 4)
    logits, ids = chosen_of(config, 7)
    with pytest.raises(ValueError, match="grad_weights: expected float32, got bfloat16"):
        route_backward_reference(torch.ones(7, 4).bfloat16(), logits, ids, config=config)
    with pytest.raises(ValueError, match=r"expert_ids: expected \[T=7, K=4\], got \[7, 3\]"):
        route_backward_reference(torch.ones(7, 4), logits, ids[:, :3].contiguous(), config=config)
