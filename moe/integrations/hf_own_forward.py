"""Experts that transformers never hands over, whose forward one of ours stands for: LongCat-Flash, and JetMoE's layer of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.gemm.config import ActivationType, WeightLayout
from moe.integrations.hf_call import call_experts
from moe.integrations.hf_experts import Form, Gate, expect_activation, expect_plain_weights

_FORM = Form(ActivationType.Swiglu, WeightLayout.MajorK, Gate())


@dataclass
class OwnForward:
    """The forward of one module, kept on it in the place of its class's; `del module.forward` gives that back."""

    module: Any
    name: str  # that use_moe was given
    is_batch_invariant: bool

    def __call__(self, *args: Tensor) -> Tensor:
        return OWN[type(self.module).__name__].forward(self.module, self.is_batch_invariant, *args)


@dataclass(frozen=True)
class Stand:
    """What stands for the forward of a class, and what it reads of a module."""

    forward: Callable[..., Tensor]
    weights: Callable[[Any], tuple[Tensor, Tensor]]  # [E, 2I, H] gate first, [E, H, I]
    activation: str  # attribute

    def expect(self, module: nn.Module, path: str) -> None:
        """Raise ValueError unless the layer computes what the module computes, from its weights."""
        expect_activation(getattr(module, self.activation, None), f"{path}.{self.activation}")
        expect_plain_weights(path, *self.weights(module))


def stand_for(module: nn.Module) -> Stand | None:
    is_transformers = type(module).__module__.startswith("transformers.")
    return OWN.get(type(module).__name__) if is_transformers else None


def _longcat_weights(experts: Any) -> tuple[Tensor, Tensor]:
    return experts.gate_up_proj[: experts.num_routed_experts], experts.down_proj


def _longcat(
    experts: Any, is_batch_invariant: bool, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Ids from num_routed_experts on stand for experts that return their input."""
    routed = call_experts(
        type(experts).__name__,
        _FORM,
        _longcat_weights(experts),
        hidden_states,
        top_k_index,
        top_k_weights,
        is_batch_invariant=is_batch_invariant,
    )
    returns_input = top_k_index >= experts.num_routed_experts
    share = torch.where(returns_input, top_k_weights, 0.0).sum(dim=-1, keepdim=True).float()
    return (routed.float() + share * hidden_states.float()).to(hidden_states.dtype)


def _jetmoe_weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.input_linear.weight, layer.output_linear.weight


def _jetmoe(layer: Any, is_batch_invariant: bool, layer_input: Tensor) -> Tensor:
    """JetMoE's router orders slots by expert; its choice is made here anew, by the same logits."""
    tokens = layer_input.reshape(-1, layer_input.shape[-1])
    logits, ids = layer.router.layer(tokens).float().topk(layer.router.top_k, dim=1)
    weights = torch.softmax(logits, dim=1).type_as(tokens)
    routed = call_experts(
        type(layer).__name__, _FORM, _jetmoe_weights(layer), tokens, ids, weights, is_batch_invariant=is_batch_invariant
    )
    return (routed + layer.bias).view(layer_input.shape)


# class -> what stands for its forward; of JetMoE the layer around its two matrices of experts
OWN = {
    "LongcatFlashExperts": Stand(_longcat, _longcat_weights, "act_fn"),
    "JetMoeMoE": Stand(_jetmoe, _jetmoe_weights, "activation"),
}
