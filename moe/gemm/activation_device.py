"""Activations on fp32 accumulators, for Triton and Gluon kernels alike. NaN comes out where NaN goes in, as in torch."""
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
STEP_LIMIT = tl.constexpr(7.0)  # SwigluStep's where none is given
SITU_ALPHA = tl.constexpr(4.0)  # Situ's where none is given, as what follows
SITU_BETA = tl.constexpr(25.0)


class Swiglu(NamedTuple):
    """Parameters of SwiGLU and its like: of all experts, pointers to [E_local] fp32 or None; of one expert, its values."""

    alpha: Any
    beta: Any
    clamp_limit: Any


@triton.jit
def activate(product, ACTIVATION: tl.constexpr):
    """An activation without a gate. ACTIVATION: `GemmConfig.activation_name`."""
    if ACTIVATION == "Gelu":
        return gelu(product)
    elif ACTIVATION == "Relu":
        return relu(product)
    elif ACTIVATION == "Silu":
        return silu(product)
    elif ACTIVATION == "Relu2":
        return relu2(product)
    elif ACTIVATION == "Identity":
        return product
    else:
        tl.static_assert(False, "no such activation without a gate in moe/gemm/activation_device.py")


@triton.jit
def activate_gated(gate, up, parameters, ACTIVATION: tl.constexpr):
    """An activation with a gate. parameters: the expert's (`swiglu_of_expert`), for activations that have any."""
    if ACTIVATION == "Swiglu" or ACTIVATION == "SwigluBias":
        return swiglu(gate, up, parameters)
    elif ACTIVATION == "SwigluStep":
        return swiglu_step(gate, up, parameters.clamp_limit)
    elif ACTIVATION == "Geglu":
        return gelu(gate) * up
    elif ACTIVATION == "GegluTanh":
        return gelu_tanh(gate) * up
    elif ACTIVATION == "Situ":
        return situ(gate, up, parameters.alpha, parameters.beta)
    else:
        tl.static_assert(False, "no such activation with a gate in moe/gemm/activation_device.py")


@triton.jit
def activate_gated_at(gate, up, pointers, expert, ACTIVATION: tl.constexpr):
    """The same with pointers to the parameters of all experts, of which one's are loaded when the products are there."""
    if ACTIVATION == "Swiglu" or ACTIVATION == "SwigluBias":
        return swiglu_at(gate, up, pointers, expert)
    else:
        return activate_gated(gate, up, swiglu_of_expert(pointers, expert, ACTIVATION), ACTIVATION)


@triton.jit
def relu(x):
    """max(x, 0)"""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu2(x):
    """max(x, 0)^2"""
    positive = relu(x)
    return positive * positive


@triton.jit
def silu(x):
    """x * sigmoid(x)"""
    return x / (1.0 + tl.exp2(x * MINUS_LOG2_E))


@triton.jit
def gelu(x):
    """x * Phi(x), with the normal distribution's Phi off by 1e-7 at the most: Abramowitz and Stegun, 7.1.26.

    tl.erf takes more registers than wide tiles leave.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + size * (0.3275911 * SQRT_HALF))
    polynomial = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return relu(x) - size * polynomial * tl.exp2(x * x * (0.5 * MINUS_LOG2_E))


@triton.jit
def gelu_tanh(x):
    """0.5 * x * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 * x^3), which is x * sigmoid(2 * u)."""
    return x / (1.0 + tl.exp2((x + 0.044715 * x * x * x) * (TWICE_SQRT_2_OVER_PI * MINUS_LOG2_E)))


@triton.jit
def tanh(x):
    """From exp(-2 * |x|), which overflows nowhere."""
    power = tl.exp2(tl.abs(x) * (2.0 * MINUS_LOG2_E))
    value = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def swiglu_of_expert(pointers, expert, ACTIVATION: tl.constexpr = tl.constexpr("Swiglu")):
    """One expert's values; where there is no pointer, the activation's own: SwiGLU's change nothing.

    The compiler drops what clamps to infinity.
    """
    ALPHA: tl.constexpr = SITU_ALPHA if ACTIVATION == "Situ" else 1.0
    BETA: tl.constexpr = SITU_BETA if ACTIVATION == "Situ" else 0.0
    LIMIT: tl.constexpr = STEP_LIMIT if ACTIVATION == "SwigluStep" else float("inf")
    alpha = ALPHA if pointers.alpha is None else tl.load(pointers.alpha + expert)
    beta = BETA if pointers.beta is None else tl.load(pointers.beta + expert)
    clamp_limit = LIMIT if pointers.clamp_limit is None else tl.load(pointers.clamp_limit + expert)
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
def swiglu_step(gate, up, limit):
    """min(silu(gate), limit) * clamp(up, -limit, limit)"""
    gate, up = clamp(silu(gate), up, limit)
    return gate * up


@triton.jit
def situ(gate, up, alpha, beta):
    """alpha * tanh(gate / alpha) * sigmoid(gate) * beta * tanh(up / beta)"""
    return alpha * tanh(gate / alpha) / (1.0 + tl.exp2(gate * MINUS_LOG2_E)) * (beta * tanh(up / beta))


@triton.jit
def clamp(gate, up, limit):
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
