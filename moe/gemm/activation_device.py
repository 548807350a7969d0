"""Activations on fp32 accumulators, for Triton and Gluon kernels alike. NaN comes out where NaN goes in, as in torch."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


class Swiglu(NamedTuple):
    """Parameters of SwiGLU: of all experts, pointers to [E_local] fp32 or None; of one expert, its values."""

    alpha: Any
    beta: Any
    clamp_limit: Any


@triton.jit
def activate(product, ACTIVATION: tl.constexpr):
    """An activation without a gate. ACTIVATION: `GemmConfig.activation_name`."""
    if ACTIVATION == "Relu2":
        return relu2(product)
    else:
        tl.static_assert(False, "no such activation without a gate in moe/gemm/activation_device.py")


@triton.jit
def activate_gated(gate, up, parameters, ACTIVATION: tl.constexpr):
    """An activation with a gate. parameters: the expert's (`swiglu_of_expert`), for activations that have any."""
    if ACTIVATION == "Swiglu":
        return swiglu(gate, up, parameters)
    else:
        tl.static_assert(False, "no such activation with a gate in moe/gemm/activation_device.py")


@triton.jit
def activate_gated_at(gate, up, pointers, expert, ACTIVATION: tl.constexpr):
    """The same with pointers to the parameters of all experts, of which one's are loaded when the products are there."""
    if ACTIVATION == "Swiglu":
        return swiglu_at(gate, up, pointers, expert)
    else:
        tl.static_assert(False, "no such activation with a gate in moe/gemm/activation_device.py")


@triton.jit
def relu2(x):
    """max(x, 0)^2"""
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def swiglu_of_expert(pointers, expert):
    """One expert's values; where there is no pointer, those that change nothing: the compiler drops what clamps to infinity."""
    alpha = 1.0 if pointers.alpha is None else tl.load(pointers.alpha + expert)
    beta = 0.0 if pointers.beta is None else tl.load(pointers.beta + expert)
    clamp_limit = float("inf") if pointers.clamp_limit is None else tl.load(pointers.clamp_limit + expert)
    return Swiglu(alpha, beta, clamp_limit)


@triton.jit
def swiglu(gate, up, parameters):
    """gate' * sigmoid(alpha * gate') * (up' + beta), with gate' = min(gate, limit) and up' = clamp(up, -limit, limit).

    parameters: the expert's, loaded before the products were there.
    """
    alpha, beta, limit = parameters
    gate, up = clamp(gate, up, limit)
    return gate / (1.0 + tl.exp2(gate * (alpha * MINUS_LOG2_E))) * (up + beta)


@triton.jit
def swiglu_at(gate, up, pointers, expert):
    """The same where parameters are loaded when the products are there, and those that are absent cost nothing.

    The few-token kernels' loads are scheduled around it: in the form above, layers with long rows took longer for one token
    (docs/measured_facts.md).
    """
    if pointers.clamp_limit is not None:
        gate, up = clamp(gate, up, tl.load(pointers.clamp_limit + expert))
    scaled_gate = gate
    if pointers.alpha is not None:
        scaled_gate = gate * tl.load(pointers.alpha + expert)
    if pointers.beta is not None:
        up += tl.load(pointers.beta + expert)
    return gate * tl.sigmoid(scaled_gate) * up


@triton.jit
def clamp(gate, up, limit):
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
