"""The torch backward stages against float64 by torch's own autograd, and by differences of numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from gemm.backward.cases import BackwardCase, exact_gradients, make_backward_case
from torch import Tensor

from moe.flow import SwigluParams, TopK
from moe.gemm.backward.kernels import STAGES, backward_stage_for
from moe.gemm.config import WeightFormat, WeightLayout
from moe.gemm.reference import gather_gemm_reference
from moe.permute.config import FinalizeConfig
from moe.permute.reference import finalize_tokens_reference
from moe.testing.closeness import relative_error

FORMATS = [
    WeightFormat(layout=layout, gate_up_order=order)
    for layout in (WeightLayout.MajorK, WeightLayout.MajorMn)
    for order in ("gate_up", "up_gate")
]
ALL_TO_ONE = torch.tensor([[3, 1]] * 7)
NOBODY = torch.full((7, 2), -1)


def stage(name: str, case: BackwardCase) -> Any:
    config = case.config
    return backward_stage_for(name, config.gemm1, config.gemm2, torch.device("cpu"))[0]


def gate_ups(case: BackwardCase) -> Tensor:
    kept = stage("gemm1_keeping", case)(case.hidden_states, case.w1, case.permutation, swiglu=case.swiglu)
    return kept.gate_up


def chained(case: BackwardCase) -> dict[str, Tensor]:
    """All gradients by the five stages, as a training pipeline chains them."""
    gate_up = gate_ups(case)
    second = stage("gemm2_dgrad", case)(
        case.grad_output, case.w2, gate_up, case.topk, case.permutation, swiglu=case.swiglu
    )
    rows = stage("gemm1_dgrad", case)(second.grad_gate_up, case.w1, case.permutation)
    if rows.dtype == torch.bfloat16:
        ones = TopK(case.topk.expert_ids, torch.ones_like(case.topk.weights))
        grad_x = finalize_tokens_reference(rows, ones, case.permutation, config=FinalizeConfig())
    else:
        row_of_slot = case.permutation.row_of_slot
        grad_x = (rows[row_of_slot.clamp(min=0).long()] * (row_of_slot >= 0)[..., None]).nan_to_num().sum(1)
    return {
        "hidden_states": grad_x,
        "w1": stage("gemm1_wgrad", case)(second.grad_gate_up, case.hidden_states, case.permutation),
        "w2": stage("gemm2_wgrad", case)(case.grad_output, second.weighted_activation, case.permutation),
        "weights": second.grad_weights,
    }


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_gradients_are_near_those_of_float64(poisoned_memory, activation, weight_format):
    case = make_backward_case(num_tokens=33, activation=activation, weight_format=weight_format)
    exact = exact_gradients(case)
    for name, grad in chained(case).items():
        assert relative_error(grad, getattr(exact, name)) <= 1e-2, name


@pytest.mark.parametrize("expert_ids", [ALL_TO_ONE, NOBODY, torch.tensor([[0, -1]] * 7)], ids=["one", "none", "half"])
def test_experts_without_rows_and_slots_without_experts_get_exact_zeros(poisoned_memory, expert_ids):
    case = make_backward_case(expert_ids=expert_ids)
    exact, grads = exact_gradients(case), chained(case)
    for name, grad in grads.items():
        wanted = getattr(exact, name)
        assert relative_error(grad, wanted) <= 1e-2, name
        assert bool((grad[wanted == 0] == 0).all()), name


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_few_tokens_on_one_rank_of_several(poisoned_memory, num_tokens):
    case = make_backward_case(num_tokens=num_tokens, num_experts=8, num_local_experts=3, local_expert_offset=2, top_k=4)
    exact = exact_gradients(case)
    for name, grad in chained(case).items():
        assert relative_error(grad, getattr(exact, name)) <= 1e-2, name


def test_the_activation_beside_what_is_kept_has_the_bits_of_gemm1():
    case = make_backward_case(num_tokens=33, weight_format=WeightFormat(gate_up_order="up_gate"))
    kept = stage("gemm1_keeping", case)(case.hidden_states, case.w1, case.permutation)
    alone = gather_gemm_reference(case.hidden_states, case.w1, case.permutation, config=case.config.gemm1)
    is_real = case.permutation.token_of_row >= 0
    assert torch.equal(kept.activation[is_real], alone[is_real])


def test_padding_rows_that_hold_nan_become_zeros():
    case = make_backward_case()
    gate_up = gate_ups(case)
    is_padding = case.permutation.token_of_row < 0
    gate_up[is_padding] = torch.nan
    second = stage("gemm2_dgrad", case)(case.grad_output, case.w2, gate_up, case.topk, case.permutation)
    assert is_padding.any()
    assert not second.grad_gate_up[is_padding].any()
    assert not second.weighted_activation[is_padding].any()


def test_weight_gradients_are_added_to_a_buffer_in_float32():
    case = make_backward_case(num_tokens=33)
    second = stage("gemm2_dgrad", case)(case.grad_output, case.w2, gate_ups(case), case.topk, case.permutation)
    before = torch.randn(case.w1.shape)
    buffer = before.clone()
    returned = stage("gemm1_wgrad", case)(second.grad_gate_up, case.hidden_states, case.permutation, out=buffer)
    assert returned is buffer
    once = stage("gemm1_wgrad", case)(second.grad_gate_up, case.hidden_states, case.permutation)
    assert relative_error(buffer - before, once) <= 4e-3
    buffer = torch.zeros(case.w2.shape)
    stage("gemm2_wgrad", case)(case.grad_output, second.weighted_activation, case.permutation, out=buffer)
    assert torch.equal(
        buffer.bfloat16(),
        stage("gemm2_wgrad", case)(case.grad_output, second.weighted_activation, case.permutation),
    )


class _Layer(torch.autograd.Function):
    """The references chained in float64, for gradcheck."""

    @staticmethod
    def forward(ctx: Any, case: BackwardCase, *tensors: Tensor) -> Tensor:
        x, w1, w2, weights, *parameters = tensors
        ctx.case = case._replace(
            hidden_states=x, w1=w1, w2=w2, topk=TopK(case.topk.expert_ids, weights), swiglu=_params(parameters)
        )
        kept = stage("gemm1_keeping", ctx.case)(x, w1, case.permutation, swiglu=ctx.case.swiglu)
        ctx.case = ctx.case._replace(grad_output=kept.gate_up)
        row_of_slot = case.permutation.row_of_slot
        output = torch.zeros_like(x)
        for token, choice in (row_of_slot >= 0).nonzero().tolist():
            expert = int(case.topk.expert_ids[token, choice]) - case.config.permute.local_expert_offset
            matrix = w2[expert].T if case.config.gemm2.weight_format.layout is WeightLayout.MajorMn else w2[expert]
            output[token] += weights[token, choice] * (matrix @ kept.activation[row_of_slot[token, choice]])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, case = ctx.case.grad_output, ctx.case._replace(grad_output=grad_output.contiguous())
        arguments = (case.grad_output, case.w2, gate_up, case.topk, case.permutation)
        second = stage("gemm2_dgrad", case)(*arguments, swiglu=case.swiglu)
        rows = stage("gemm1_dgrad", case)(second.grad_gate_up, case.w1, case.permutation)
        row_of_slot = case.permutation.row_of_slot
        grad_x = torch.where(
            (row_of_slot >= 0)[..., None], rows[row_of_slot.clamp(min=0).long()], torch.zeros((), dtype=torch.float64)
        ).sum(1)
        parameters: list[Tensor] = []
        if case.swiglu is not None:
            grads = stage("swiglu_gradients", case)(*arguments, swiglu=case.swiglu)
            parameters = [grads.alpha, grads.beta, grads.clamp_limit]
        return (
            None,
            grad_x,
            stage("gemm1_wgrad", case)(second.grad_gate_up, case.hidden_states, case.permutation),
            stage("gemm2_wgrad", case)(case.grad_output, second.weighted_activation, case.permutation),
            second.grad_weights,
            *parameters,
        )


def _params(parameters: list[Tensor]) -> SwigluParams | None:
    return SwigluParams(*parameters) if parameters else None


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["Swiglu", "Relu2", "parameters"])
def test_gradcheck_in_float64(kind, weight_format):
    torch.manual_seed(0)
    case = make_backward_case(
        num_tokens=3,
        hidden_size=8,
        intermediate_size=8,
        num_experts=3,
        activation="Relu2" if kind == "Relu2" else "Swiglu",
        weight_format=weight_format,
        expert_ids=torch.tensor([[0, 2], [2, 0], [2, -1]]),
    )
    inputs = [case.hidden_states, case.w1, case.w2, case.topk.weights]
    if kind == "parameters":  # some values lie beyond the limit, and none upon it
        inputs += [torch.tensor([1.7, 1.0, 0.5]), torch.tensor([1.0, 0.0, 0.3]), torch.tensor([0.4, 0.5, 0.7])]
    doubles = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(partial(_Layer.apply, case), doubles)


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"swiglu_gradients"}))
def test_weights_that_have_no_gradients_are_refused_in_words(name):
    case = make_backward_case(hidden_size=64, intermediate_size=32, weight_format=WeightFormat(is_shuffled=True))
    arguments = {
        "gemm1_keeping": (case.hidden_states, case.w1, case.permutation),
        "gemm2_dgrad": (case.grad_output, case.w2, case.w1, case.topk, case.permutation),
        "gemm1_dgrad": (case.w1, case.w1, case.permutation),
        "gemm1_wgrad": (case.w1, case.hidden_states, case.permutation),
        "gemm2_wgrad": (case.grad_output, case.w1, case.permutation),
    }
    with pytest.raises(
        ValueError, match=r"gemm[12]\.weight_format: expected MajorK or MajorMn .*, got shuffled MajorK"
    ):
        stage(name, case)(*arguments[name])


def test_a_buffer_of_another_dtype_is_refused():
    case = make_backward_case()
    second = stage("gemm2_dgrad", case)(case.grad_output, case.w2, gate_ups(case), case.topk, case.permutation)
    with pytest.raises(ValueError, match="main_grad of gemm1: expected float32, got bfloat16"):
        stage("gemm1_wgrad", case)(second.grad_gate_up, case.hidden_states, case.permutation, out=case.w1.clone())


def test_parameters_of_swiglu_get_gradients_near_those_of_float64():
    # The limit lies halfway between two numbers of bf16, so that what is kept is clamped where the product is.
    swiglu = SwigluParams(torch.full((5,), 1.702), torch.ones(5), torch.full((5,), 0.701171875))
    case = make_backward_case(num_tokens=33, swiglu=swiglu)
    exact = exact_gradients(case)
    grads = stage("swiglu_gradients", case)(
        case.grad_output, case.w2, gate_ups(case), case.topk, case.permutation, swiglu=swiglu
    )
    for name in ("alpha", "beta", "clamp_limit"):
        assert relative_error(getattr(grads, name), getattr(exact.swiglu, name)) <= 1e-2, name
    for name, grad in chained(case).items():
        assert relative_error(grad, getattr(exact, name)) <= 1e-2, name
