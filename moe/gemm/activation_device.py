"""Activations on fp32 accumulators. NaN comes out where NaN goes in, as in torch."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def relu2(x):
    """max(x, 0)^2"""
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def swiglu(gate, up, expert, alpha_ptr, beta_ptr, clamp_limit_ptr):
    """gate' * sigmoid(alpha * gate') * (up' + beta), with gate' = min(gate, limit) and up' = clamp(up, -limit, limit).

    alpha_ptr, beta_ptr, clamp_limit_ptr: [E_local] fp32, or None for 1, 0 and no limit.
    """
    if clamp_limit_ptr is not None:
        limit = tl.load(clamp_limit_ptr + expert)
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    scaled_gate = gate
    if alpha_ptr is not None:
        scaled_gate = gate * tl.load(alpha_ptr + expert)
    if beta_ptr is not None:
        up += tl.load(beta_ptr + expert)
    return gate * tl.sigmoid(scaled_gate) * up
