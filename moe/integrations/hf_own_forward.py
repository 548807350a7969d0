"""Experts that transformers never hands over, whose forward one of ours stands for, or the forward of the layer around them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.gemm.config import WeightLayout
from moe.integrations.hf_call import Linear, call_between, call_experts
from moe.integrations.hf_experts import Form, expect_activation, expect_plain_weights, own_gate_of, weights_of


@dataclass
class OwnForward:
    """The forward of one module, kept on it in the place of its class's; `del module.forward` gives that back."""

    module: Any
    name: str  # that use_moe was given
    is_batch_invariant: bool

    def __call__(self, *args: Tensor) -> Any:
        return OWN[type(self.module).__name__].forward(self.module, self.is_batch_invariant, *args)


@dataclass(frozen=True)
class Stand:
    """What stands for the forward of a class, and what it reads of a module."""

    forward: Callable[..., Any]  # (module, is_batch_invariant, *its arguments) -> its result
    weights: Callable[
        [Any], tuple[Tensor, Tensor]
    ]  # [E, 2I, H] gate first, [E, H, I]; the last axes swapped for Llama 4
    activation: str  # attribute; "" where the module's gate is tried instead

    def expect(self, module: nn.Module, path: str, gathered_dtype: torch.dtype | None) -> None:
        """Raise ValueError unless the layer computes what the module computes, from its weights; see `expect_weights`."""
        if self.activation:
            activation = operator.attrgetter(self.activation)(module)
            expect_activation(activation, f"{path}.{self.activation}")
        else:
            own_gate_of(module, path)
        expect_plain_weights(path, *self.weights(module), gathered_dtype)


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
        Form(expect_activation(experts.act_fn, "act_fn"), WeightLayout.MajorK),
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
    form = Form(expect_activation(layer.activation, "activation"), WeightLayout.MajorK)
    inputs = (tokens, ids, weights)
    routed = call_experts(
        type(layer).__name__, form, _jetmoe_weights(layer), *inputs, is_batch_invariant=is_batch_invariant
    )
    return (routed + layer.bias).view(layer_input.shape)


def _step(
    experts: Any, is_batch_invariant: bool, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    path = type(experts).__name__
    activation, gate = own_gate_of(experts, path)
    form = Form(activation, WeightLayout.MajorK, gate)
    inputs = (hidden_states, top_k_index, top_k_weights)
    return call_experts(path, form, weights_of(experts), *inputs, is_batch_invariant=is_batch_invariant)


def _llama4_weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.experts.gate_up_proj, layer.experts.down_proj


def _llama4(layer: Any, is_batch_invariant: bool, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The router's weight goes into an expert's input."""
    tokens = hidden_states.reshape(-1, layer.hidden_dim)
    scores, logits = layer.router(tokens)
    ids = logits.topk(layer.top_k, dim=1).indices
    form = Form(expect_activation(layer.experts.act_fn, "experts.act_fn"), WeightLayout.MajorMn)
    inputs = (_llama4_weights(layer), tokens, ids, scores.gather(1, ids))
    path = type(layer).__name__
    routed = call_experts(path, form, *inputs, is_batch_invariant=is_batch_invariant, weighs_input=True)
    return (layer.shared_expert(tokens) + routed).to(hidden_states.dtype), logits


def _dbrx_weights(experts: Any) -> tuple[Tensor, Tensor]:
    """Gate and down, as [E, I, H]; up lies apart, like gate."""
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    return experts.mlp.w1.view(shape), experts.mlp.w2.view(shape)


def _dbrx(
    experts: Any, is_batch_invariant: bool, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Gate and up are matrices of their own, so the three are multiplied apart."""
    gate, down = _dbrx_weights(experts)
    inputs = (hidden_states, top_k_index, top_k_weights)

    def between(linear: Linear, rows: Tensor) -> Tensor:
        up = linear(rows, experts.mlp.v1.view(gate.shape), WeightLayout.MajorK)
        return experts.mlp.activation_fn(linear(rows, gate, WeightLayout.MajorK).float()) * up.float()

    result = call_between(
        type(experts).__name__,
        (gate, down),
        WeightLayout.MajorMn,
        *inputs,
        between=between,
        is_batch_invariant=is_batch_invariant,
    )
    return result.view(len(hidden_states), -1, experts.hidden_size)


# class -> what stands for its forward; of JetMoE and Llama 4 the layer around the experts
OWN = {
    "DbrxExperts": Stand(_dbrx, _dbrx_weights, "mlp.activation_fn"),
    "JetMoeMoE": Stand(_jetmoe, _jetmoe_weights, "activation"),
    "Llama4TextMoe": Stand(_llama4, _llama4_weights, "experts.act_fn"),
    "LongcatFlashExperts": Stand(_longcat, _longcat_weights, "act_fn"),
    "Step3p7Experts": Stand(_step, weights_of, ""),
}
