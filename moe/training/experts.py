"""The experts' part forward, with what is kept for the way back, and backward by a stage for each gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe.call import LayerCall
from moe.checks import expect_separate, is_as_expected
from moe.config import MoEConfig
from moe.flow import Gemm2Gradients, Permutation, SwigluParams, TopK
from moe.gemm.backward.checks import check_accumulated
from moe.pipeline import MoEPipeline
from moe.stages import CheckedStage, Finalizer
from moe.training.stages import (
    Gemm1Dgrad,
    Gemm1Keeping,
    Gemm1Wgrad,
    Gemm2Dgrad,
    Gemm2Wgrad,
    RouteBackward,
    SwigluGradients,
)


class Training(Protocol):
    """The fields of a TrainingPipeline that say what runs."""

    @property
    def config(self) -> MoEConfig: ...
    @property
    def gemm1_keeping(self) -> Gemm1Keeping: ...
    @property
    def gemm2_dgrad(self) -> Gemm2Dgrad: ...
    @property
    def gemm1_dgrad(self) -> Gemm1Dgrad: ...
    @property
    def gemm1_wgrad(self) -> Gemm1Wgrad: ...
    @property
    def gemm2_wgrad(self) -> Gemm2Wgrad: ...
    @property
    def swiglu_gradients(self) -> SwigluGradients: ...
    @property
    def sum_slots(self) -> Finalizer: ...
    @property
    def route_backward(self) -> RouteBackward: ...
    def at(self, num_tokens: int) -> MoEPipeline: ...
    def keeps_gate_up(self, num_tokens: int) -> bool: ...


class Kept(NamedTuple):
    """What a forward pass keeps beside its inputs; what is None is made anew on the way back."""

    gate_up: Tensor | None = None
    permutation: Permutation | None = None


class Wanted(NamedTuple):
    """Which gradients a backward pass makes."""

    hidden_states: bool = True
    expert_weights: bool = True
    w1: bool = True
    w2: bool = True
    alpha: bool = False
    beta: bool = False
    clamp_limit: bool = False

    @property
    def of_swiglu(self) -> bool:
        return self.alpha or self.beta or self.clamp_limit


class GradBuffers(NamedTuple):
    """Where weight gradients are added in float32, as Megatron's main_grad; None where the gradient is returned in bfloat16.

    Shapes of the weights, contiguous, memory of their own.
    """

    w1: Tensor | None = None
    w2: Tensor | None = None


class ExpertGradients(NamedTuple):
    """None where a gradient is not wanted, or was added to a buffer."""

    hidden_states: Tensor | None = None
    expert_weights: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    clamp_limit: Tensor | None = None


def forward_experts(training: Training, call: LayerCall, *, keeps: bool) -> tuple[Tensor, Kept]:
    """Chosen experts by the stages of inference -> [T, H] bfloat16, and what a backward pass needs beside the inputs.

    The call was checked. gemm1_keeping runs in the place of gemm1 where it gives the same bits. For few tokens, which run fused,
    nothing is kept.
    """
    num_tokens = call.num_tokens
    forward = training.at(num_tokens)
    stages = forward.ready
    if num_tokens <= stages.max_fused_tokens:
        output = stages.fused(call.entry, call.hidden_states, call.w1, call.w2, swiglu=call.swiglu, output=None)
        return output, Kept()
    permutation = stages.permute(call.entry)
    gate_up = None
    if keeps and training.keeps_gate_up(num_tokens):
        keeping = launch_of(training.gemm1_keeping)
        activation, gate_up = keeping(call.hidden_states, call.w1, permutation, swiglu=call.swiglu)
    else:
        activation = stages.gemm1(call.hidden_states, call.w1, permutation, swiglu=call.swiglu)
    rows = stages.gemm2(activation, call.w2, permutation)
    del activation
    return stages.finalize(rows, call.entry, permutation, output=None), Kept(gate_up, permutation if keeps else None)


def backward_experts(
    training: Training,
    grad_output: Tensor,
    call: LayerCall,
    kept: Kept,
    wanted: Wanted,
    buffers: GradBuffers = GradBuffers(),
) -> ExpertGradients:
    """The gradients that are wanted, from that of the output [T, H]. Deterministic where the stages are.

    Args:
        call: that went forward; hidden_states is read for w1's gradient and where gate_up was not kept, w1 for
            hidden_states' and there too.
    """
    topk, swiglu = call.entry, call.swiglu
    check_buffers(training.config, buffers, {"grad_output": grad_output})
    if wanted.of_swiglu and grad_output.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "swiglu: expected parameters that want no gradient while a CUDA graph is captured, got requires_grad=True; their gradient "
            "waits for the device: detach them, or run this step without a graph"
        )
    permutation = kept.permutation
    if permutation is None:
        permutation = training.at(call.num_tokens).ready.permute(topk)
    gate_up = kept.gate_up
    if gate_up is None:
        gate_up = launch_of(training.gemm1_keeping)(call.hidden_states, call.w1, permutation, swiglu=swiglu).gate_up
    arguments = (grad_output, call.w2, gate_up, topk, permutation)
    second: Gemm2Gradients = launch_of(training.gemm2_dgrad)(*arguments, swiglu=swiglu)
    _check_second(training, second, permutation)
    grads: dict[str, Tensor] = {}
    if wanted.expert_weights:
        grads["expert_weights"] = second.grad_weights.to(topk.weights.dtype)
    if wanted.of_swiglu:
        of_swiglu = launch_of(training.swiglu_gradients)(*arguments, swiglu=swiglu)
        for name in ("alpha", "beta", "clamp_limit"):
            if getattr(wanted, name):
                grads[name] = getattr(of_swiglu, name)
    del gate_up, arguments
    grad_gate_up, weighted, _ = second
    del second
    if wanted.w2:
        wgrad = launch_of(training.gemm2_wgrad)(grad_output, weighted, permutation, out=buffers.w2)
        if buffers.w2 is None:
            grads["w2"] = wgrad
    del weighted
    if wanted.w1:
        wgrad = launch_of(training.gemm1_wgrad)(grad_gate_up, call.hidden_states, permutation, out=buffers.w1)
        if buffers.w1 is None:
            grads["w1"] = wgrad
    if wanted.hidden_states:
        grads["hidden_states"] = _grad_of_tokens(training, grad_gate_up, call, permutation)
    return ExpertGradients(**grads)


def _grad_of_tokens(training: Training, grad_gate_up: Tensor, call: LayerCall, permutation: Permutation) -> Tensor:
    """[T, H]: the sum of what a token's rows add."""
    shape = permutation.row_of_slot.shape
    ones = torch.ones(
        shape, dtype=torch.bfloat16, device=grad_gate_up.device
    )  # before the rows, which finalize may wait for alone
    rows = launch_of(training.gemm1_dgrad)(grad_gate_up, call.w1, permutation)
    return launch_of(training.sum_slots)(rows, TopK(permutation.row_of_slot, ones), permutation, output=None)


def launch_of(stage: Any) -> Any:
    """A stage of ours without its checks, since its tensors were; another as it is."""
    return stage.launch if isinstance(stage, CheckedStage) else stage


def _check_second(training: Training, second: Gemm2Gradients, permutation: Permutation) -> None:
    """Raise unless a swapped gemm2_dgrad gave what the stages after it read."""
    if isinstance(training.gemm2_dgrad, CheckedStage):
        return
    rows, gemm1 = permutation.max_rows, training.config.gemm1
    device = permutation.token_of_row.device
    wanted = {
        "grad_gate_up": ((rows, gemm1.weight_rows), torch.bfloat16),
        "weighted_activation": ((rows, gemm1.out_features), torch.bfloat16),
        "grad_weights": (tuple(permutation.row_of_slot.shape), torch.float32),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = getattr(second, name)
        if not is_as_expected(tensor, shape, dtype, device):
            raise ValueError(
                f"result of gemm2_dgrad: {name}: expected {list(shape)} {dtype} on {device}, contiguous, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}; return moe.flow.Gemm2Gradients of those"
            )


def check_buffers(config: MoEConfig, buffers: GradBuffers, read: Mapping[str, Tensor]) -> None:
    """Raise unless gradients may be added to the buffers that there are: memory of their own, apart from what is read too."""
    check_accumulated("gemm1", config.gemm1, buffers.w1, read)
    check_accumulated("gemm2", config.gemm2, buffers.w2, read)
    if buffers.w1 is not None and buffers.w2 is not None:
        expect_separate("main_grad of gemm2", buffers.w2, {"main_grad of gemm1": buffers.w1})


def swiglu_of(alpha: Tensor | None, beta: Tensor | None, clamp_limit: Tensor | None) -> SwigluParams | None:
    """None where there is no parameter."""
    if alpha is None and beta is None and clamp_limit is None:
        return None
    return SwigluParams(alpha, beta, clamp_limit)
