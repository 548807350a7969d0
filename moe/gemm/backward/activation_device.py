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
def differentiate_gated(gate, up, parameters, ACTIVATION: tl.constexpr):
    """An activation with a gate: its value, and its derivatives by gate and by up. parameters: the expert's."""
    if ACTIVATION == "Swiglu":
        return differentiate_swiglu(gate, up, parameters)
    else:
        tl.static_assert(False, "no derivatives of this activation in moe/gemm/backward/activation_device.py")


@triton.jit
def differentiate_swiglu(gate, up, parameters):
    """Of gate' sigmoid(alpha gate') (up' + beta): by gate' it is sigmoid (1 + alpha gate' (1 - sigmoid)) (up' + beta)."""
    alpha, beta, limit = parameters
    is_gate_free = gate <= limit
    is_up_free = (up <= limit) & (up >= -limit)
    gate, up = clamp(gate, up, limit)
    share = 1.0 / (1.0 + tl.exp2(gate * (alpha * MINUS_LOG2_E)))
    gated = gate * share
    shifted = up + beta
    by_gate = (share + alpha * gated * (1.0 - share)) * shifted
    return gated * shifted, tl.where(is_gate_free, by_gate, 0.0), tl.where(is_up_free, gated, 0.0)
