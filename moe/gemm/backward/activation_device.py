"""Activations and their derivatives on fp32 products, for Triton and Gluon kernels alike.

Where a value lies on its limit it counts as not clamped, as in torch.clamp.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe.gemm.activation_device import MINUS_LOG2_E, clamp, relu2


@triton.jit
def differentiate(product, ACTIVATION: tl.constexpr):
    """An activation without a gate: its value, and its derivative."""
    if ACTIVATION == "Relu2":
        return relu2(product), 2.0 * tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(False, "no derivative of this activation in moe/gemm/backward/activation_device.py")


@triton.jit
def differentiate_gated(gate, up, parameters, ACTIVATION: tl.constexpr, IS_CLAMPED: tl.constexpr):
    """An activation with a gate: its value, and its derivatives by gate and by up.

    parameters: the expert's. IS_CLAMPED: whether there is a limit.
    """
    if ACTIVATION == "Swiglu":
        gate_in, up_in = gate, up
        if IS_CLAMPED:
            gate, up = clamp(gate, up, parameters.clamp_limit)
        share = 1.0 / (1.0 + tl.exp2(gate * (parameters.alpha * MINUS_LOG2_E)))
        value, by_gate, by_up = differentiate_swiglu(gate, up, share, parameters)
        if IS_CLAMPED:
            by_gate, by_up = without_clamped(gate_in, up_in, by_gate, by_up, parameters.clamp_limit)
        return value, by_gate, by_up
    else:
        tl.static_assert(False, "no derivatives of this activation in moe/gemm/backward/activation_device.py")


@triton.jit
def differentiate_swiglu(gate, up, share, parameters):
    """gate share (up + beta) with share = sigmoid(alpha gate), and its derivatives by what was clamped already."""
    gated = gate * share
    shifted = up + parameters.beta
    by_gate = (share + parameters.alpha * gated * (1.0 - share)) * shifted
    return gated * shifted, by_gate, gated


@triton.jit
def without_clamped(gate, up, by_gate, by_up, limit):
    """Derivatives by what was not clamped yet."""
    is_up_free = (up <= limit) & (up >= -limit)
    return tl.where(gate <= limit, by_gate, 0.0), tl.where(is_up_free, by_up, 0.0)
