"""The gradient of routing weights by logits. One program per token."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def route_backward_kernel(
    grad_weights_ptr,  # [T, TOP_K] fp32
    logits_ptr,  # [T, NUM_EXPERTS] fp32 or bf16
    expert_ids_ptr,  # [T, TOP_K] int32
    grad_logits_ptr,  # [T, NUM_EXPERTS], like logits
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,  # "softmax_of_all", "softmax", "logit", "sigmoid", "share" or "scaled_share"
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, BLOCK_K)
    expert = tl.arange(0, BLOCK_E)
    in_row = expert < NUM_EXPERTS
    chosen = tl.load(expert_ids_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    is_expert = (chosen >= 0) & (chosen < NUM_EXPERTS)
    g = tl.load(grad_weights_ptr + token * TOP_K + choice, mask=is_expert, other=0.0)
    if RULE == "softmax_of_all":
        by_choice = g
    else:
        x = tl.load(logits_ptr + token * NUM_EXPERTS + chosen, mask=is_expert, other=float("-inf")).to(tl.float32)
        by_choice = tl.where(is_expert, _by_chosen(g, x, RULE, SCALE, EPSILON), 0.0)
    # An expert that is chosen twice, as replayed ids may have it, gets the sum: no two stores to one place.
    total = tl.zeros([BLOCK_E], tl.float32)
    for position in range(TOP_K):
        is_this = choice == position
        expert_here = tl.sum(tl.where(is_this & is_expert, chosen + 1, 0)) - 1
        total += tl.where(expert == expert_here, tl.sum(tl.where(is_this, by_choice, 0.0)), 0.0)
    if RULE == "softmax_of_all":
        row = tl.load(logits_ptr + token * NUM_EXPERTS + expert, mask=in_row, other=float("-inf")).to(tl.float32)
        shares = _softmax(row)
        total = shares * (total - tl.sum(total * shares))
    tl.store(grad_logits_ptr + token * NUM_EXPERTS + expert, total.to(grad_logits_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _by_chosen(g, x, RULE: tl.constexpr, SCALE: tl.constexpr, EPSILON: tl.constexpr):
    """The gradient of the chosen experts' logits x, -inf where there is no expert, from that of their weights."""
    if RULE == "logit":
        by_chosen = g
    elif RULE == "softmax":
        shares = _softmax(x)
        by_chosen = shares * (g - tl.sum(g * shares))
    else:
        terms = tl.sigmoid(x)
        slope = terms * (1.0 - terms)
        total = tl.sum(terms)
        dot = tl.sum(g * terms)
        if RULE == "sigmoid":
            by_chosen = slope * g
        elif RULE == "share":
            divisor = tl.maximum(total, EPSILON)
            by_chosen = slope * (g - tl.where(total >= EPSILON, dot / divisor, 0.0)) / divisor
        else:
            tl.static_assert(RULE == "scaled_share")
            divisor = total + EPSILON
            by_chosen = slope * SCALE * (g - dot / divisor) / divisor
    return by_chosen


@triton.jit
def _softmax(x):
    terms = tl.exp(x - tl.max(x, axis=0))
    return terms / tl.sum(terms)
