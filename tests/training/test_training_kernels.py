"""The layer under autograd with every stage by a portable kernel: in Triton's interpreter, and on the GPU."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from gemm.backward.cases import exact_gradients
from training.layers import NAMES, exact_layer, leaves_of, make_layer, trained

import moe
from moe.flow import TopK
from moe.testing.closeness import relative_error


def with_kernels(config: moe.MoEConfig, training: moe.TrainingPipeline, *, keeps: bool) -> moe.TrainingPipeline:
    """The same by the portable kernels, whatever the device; gemm1_keeping in the forward pass or in the backward one."""
    from moe.gemm.backward.dgrad import portable_gemm2_dgrad
    from moe.gemm.backward.keeping import portable_gemm1_keeping
    from moe.gemm.backward.transposed import transposed
    from moe.gemm.backward.wgrad import portable_gemm1_wgrad, portable_gemm2_wgrad
    from moe.gemm.portable.gemm1 import portable_gemm1
    from moe.gemm.portable.gemm2 import portable_gemm2
    from moe.permute.finalize import finalize_tokens
    from moe.permute.triton_plan import plan_permutation
    from moe.routing.backward import route_backward
    from moe.routing.reference import select_experts_reference
    from moe.stages import CheckedStage

    gemm1, gemm2 = config.gemm1, config.gemm2
    run_gemm1 = partial(portable_gemm1, config=gemm1)
    finalize = partial(finalize_tokens, config=config.finalize)
    forward = moe.MoEPipeline(
        config,
        route=partial(select_experts_reference, config=config.routing),
        permute=partial(plan_permutation, config=config.permute),
        gemm1=CheckedStage(run_gemm1, run_gemm1, gemm1),
        gemm2=partial(portable_gemm2, config=gemm2),
        finalize=finalize,
    )
    return dataclasses.replace(
        training,
        forward=forward,
        gemm1_keeping=partial(portable_gemm1_keeping, config=gemm1),
        gemm2_dgrad=partial(portable_gemm2_dgrad, config=gemm2, gemm1=gemm1),
        gemm1_dgrad=partial(portable_gemm2, config=transposed(gemm1)),
        gemm1_wgrad=partial(portable_gemm1_wgrad, config=gemm1),
        gemm2_wgrad=partial(portable_gemm2_wgrad, config=gemm2),
        sum_slots=finalize,
        route_backward=partial(route_backward, config=config.routing),
        keeps_bits=lambda gemm1, tile_rows, mean_rows: keeps,
    )


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "made_anew"])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
def test_gradients_are_near_those_of_float64(triton_device, poisoned_memory, num_tokens, activation, keeps):
    case, training = make_layer(triton_device, num_tokens=num_tokens, activation=activation)
    training = with_kernels(case.config, training, keeps=keeps)
    output, leaves = trained(training, case)
    ids = training.forward.route(leaves.logits.detach()).expert_ids
    exact = exact_layer(case, ids)
    for name in NAMES:
        assert relative_error(leaves.grads[name], exact[name]) <= 1e-2, name
    assert torch.equal(output, training.forward(*(tensor.detach() for tensor in leaves)))


def test_one_rank_of_several_with_slots_of_nobody(triton_device, poisoned_memory):
    sizes = {"num_tokens": 21, "num_experts": 8, "num_local_experts": 3, "local_expert_offset": 2, "top_k": 3}
    ids = torch.arange(63).view(21, 3) % 10 - 1  # -1 and 8 are no experts
    ids[ids == 4] = 5  # nor do all of those here have tokens
    case, training = make_layer(triton_device, expert_ids=ids, **sizes)
    training = with_kernels(case.config, training, keeps=True)
    leaves, weights = leaves_of(case), case.topk.weights.clone().requires_grad_()
    training.run_experts(TopK(case.topk.expert_ids, weights), *leaves[1:]).backward(case.grad_output)
    exact = exact_gradients(case)
    for name in NAMES[1:]:
        assert relative_error(leaves.grads[name], getattr(exact, name)) <= 1e-2, name
    assert relative_error(weights.grad, exact.weights) <= 1e-2
    assert not leaves.w1.grad[2].any()
    assert not weights.grad[exact.weights == 0].any()


def test_weight_gradients_are_added_to_buffers(triton_device):
    case, training = make_layer(triton_device, num_tokens=33)
    training = with_kernels(case.config, training, keeps=True)
    _, plain = trained(training, case)
    buffers = moe.GradBuffers(*(torch.zeros(w.shape, device=triton_device) for w in (case.w1, case.w2)))
    for _ in range(2):
        trained(training, case, grad_buffers=buffers)
    for name in ("w1", "w2"):
        assert relative_error(getattr(buffers, name) / 2, plain.grads[name]) <= 4e-3, name
