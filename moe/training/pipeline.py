"""TrainingPipeline: the layer under autograd. Forward by the stages of inference, backward by one for each gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe.call import LayerCall, check_call
from moe.checks import expect_type
from moe.config import MoEConfig
from moe.flow import SwigluParams, TopK
from moe.gemm.config import GemmConfig
from moe.gemm.reference import gather_gemm_reference
from moe.pipeline import MoEPipeline
from moe.routing.reference import weigh_experts
from moe.stages import CheckedStage, Finalizer
from moe.traced import expect_kinds, is_traced
from moe.training import known
from moe.training.experts import GradBuffers, check_buffers
from moe.training.experts_operator import parameters_of_all, run_experts
from moe.training.route_operator import route
from moe.training.stages import (
    Gemm1Dgrad,
    Gemm1Keeping,
    Gemm1Wgrad,
    Gemm2Dgrad,
    Gemm2Wgrad,
    KeepsBits,
    RouteBackward,
    SwigluGradients,
)
from moe.tuning.tuned import TunedPipeline


@dataclass(frozen=True)
class TrainingPipeline:
    """A bf16 MoE layer that autograd can differentiate: `moe.build_training_pipeline` makes one.

    Called as a MoEPipeline is, and with its bits: `forward` runs, and where a gradient is wanted keeps the permutation and
    the product before the activation, [P, 2I] bfloat16, beside the inputs. With `recompute`, or where another kernel than
    gemm1_keeping runs forward, that product is made anew on the way back. What nobody asks a gradient of costs nothing.

    Gradients reach hidden_states, w1, w2, the logits (or the weights of chosen experts) and swiglu's parameters. Which experts
    were chosen is a constant, and the routing's bias, which chooses alone, has none. There is no second derivative.

    Any stage is swapped with `dataclasses.replace(training, gemm1_wgrad=mine)`; those of `forward` too, in it.
    """

    config: MoEConfig
    device: torch.device
    forward: MoEPipeline | TunedPipeline
    gemm1_keeping: Gemm1Keeping
    gemm2_dgrad: Gemm2Dgrad
    gemm1_dgrad: Gemm1Dgrad
    gemm1_wgrad: Gemm1Wgrad
    gemm2_wgrad: Gemm2Wgrad
    swiglu_gradients: SwigluGradients
    sum_slots: Finalizer  # adds a token's rows up, with weights of one
    route_backward: RouteBackward
    keeps_bits: KeepsBits
    recompute: bool = False
    key: str = ""  # by which operators know it; made anew where a field was replaced

    def __post_init__(self) -> None:
        built = known.known(self.key, self.device)
        if not self.key:
            object.__setattr__(self, "key", known.remember_swapped(self))
        elif built is None:
            known.remember(self, self.key)
        elif any(getattr(self, field.name) is not getattr(built, field.name) for field in _STAGES):
            object.__setattr__(self, "key", known.remember_swapped(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if known.is_swapped(self.key):  # a copy's stages are copies too
            object.__setattr__(self, "key", known.remember_swapped(self))

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        routing_replay_out: Tensor | None = None,
        grad_buffers: GradBuffers | None = None,
        **others: NoReturn,
    ) -> Tensor:
        """logits and hidden_states -> [T, H] bfloat16, as `MoEPipeline` has it.

        Args:
            bias: chooses experts, and gets no gradient.
            routing_replay_out: [>=T, K] int16; rows [0, T) receive the chosen global ids.
            grad_buffers: where gradients of w1 and w2 are added in float32 by the backward pass; their `.grad` is then left.

        Raises:
            TypeError, ValueError: as `MoEPipeline`, before anything runs; TypeError for what else that takes and this does not.
        """
        _refuse(others, "bias, swiglu, routing_replay_out or grad_buffers")
        self._check(LayerCall(logits, hidden_states, w1, w2, swiglu, bias, None, routing_replay_out), grad_buffers)
        topk = TopK(*route(logits, bias, self.key))
        if routing_replay_out is not None:
            # In inference mode, where the caller may have allocated it.
            with torch.no_grad() if is_traced(hidden_states) else torch.inference_mode():
                routing_replay_out[: logits.shape[0]] = topk.expert_ids.to(routing_replay_out.dtype)
        return self._run(topk, hidden_states, w1, w2, swiglu, grad_buffers)

    def replay(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        grad_buffers: GradBuffers | None = None,
        **others: NoReturn,
    ) -> Tensor:
        """The same with experts that were chosen before, [T, K] of any integer dtype, weighed by the rule as `moe.weigh_experts`."""
        _refuse(others, "swiglu or grad_buffers")
        topk = weigh_experts(logits, expert_ids, config=self.config.routing)
        return self.run_experts(topk, hidden_states, w1, w2, swiglu=swiglu, grad_buffers=grad_buffers)

    def run_experts(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        grad_buffers: GradBuffers | None = None,
        **others: NoReturn,
    ) -> Tensor:
        """The same from chosen experts; gradients reach topk.weights. Ids that are not local, or no expert's, are skipped."""
        _refuse(others, "swiglu or grad_buffers")
        self._check(LayerCall(topk, hidden_states, w1, w2, swiglu, None, None, None, True), grad_buffers)
        return self._run(topk, hidden_states, w1, w2, swiglu, grad_buffers)

    def at(self, num_tokens: int) -> MoEPipeline:
        """The pipeline that runs `num_tokens` tokens forward."""
        return self.forward if isinstance(self.forward, MoEPipeline) else self.forward.at(num_tokens)

    def keeps_gate_up(self, num_tokens: int) -> bool:
        """Whether gemm1_keeping runs forward over so many tokens, in the place of gemm1, and what it keeps is kept."""
        forward = self.at(num_tokens)
        gemm1, permute = forward.config.gemm1, forward.config.permute
        if self.recompute or not _is_ours(forward.gemm1, gemm1) or num_tokens <= forward.ready.max_fused_tokens:
            return False
        return self.keeps_bits(gemm1, permute.rows_per_tile(num_tokens), permute.mean_rows(num_tokens))

    def _check(self, call: LayerCall, grad_buffers: GradBuffers | None) -> None:
        if grad_buffers is not None:
            expect_type("grad_buffers", grad_buffers, GradBuffers, "moe.GradBuffers(w1, w2) makes one")
        if is_traced(call.hidden_states):  # the operator looks at shapes, and at buffers on the way back
            expect_kinds(call)
            return
        with torch.no_grad():  # under which a call may have tensors that want gradients
            check_call(self.config, call)
        if grad_buffers is not None:
            read = {"hidden_states": call.hidden_states, "gemm1_weights": call.w1, "gemm2_weights": call.w2}
            check_buffers(self.config, grad_buffers, read)

    def _run(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        swiglu: SwigluParams | None,
        grad_buffers: GradBuffers | None,
    ) -> Tensor:
        numbers = self.config.swiglu
        if swiglu is None and numbers is not None:
            values = (numbers.alpha, numbers.beta, numbers.clamp_limit)
            parameters = parameters_of_all(*values, self.config.gemm1.num_experts, hidden_states)
        else:
            parameters = (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)
        buffers = grad_buffers or GradBuffers()
        return run_experts(hidden_states, topk, w1, w2, parameters, buffers, self.key, is_checked=True)


_CURES = {
    "added": "add it to the result in torch, where autograd sees it",
    "w1_bias": "experts with biases train with torch's own operators",
    "w2_bias": "experts with biases train with torch's own operators",
    "output": "copy the result, which has memory of its own",
    "workspace": "leave it out: what is kept for the backward pass outlives the call",
}


def _refuse(others: Mapping[str, object], wanted: str) -> None:
    """Raise TypeError for keywords of MoEPipeline's calls that a training call does not take, and for those of nobody."""
    for name in others:
        cure = _CURES.get(name, "leave it out")
        raise TypeError(
            f"{name}: expected {wanted} beside the tensors of a training call, got {name}, which it does not take; {cure}"
        )


_STAGES = [field for field in dataclasses.fields(TrainingPipeline) if field.name not in ("config", "device", "key")]


def _is_ours(stage: Any, config: GemmConfig) -> bool:
    """Whether it is what a pipeline of this package runs gemm1 by: kernels, or the reference."""
    if isinstance(stage, partial):
        return stage.func is gather_gemm_reference and stage.keywords == {"config": config}
    return isinstance(stage, CheckedStage) and stage.config == config
