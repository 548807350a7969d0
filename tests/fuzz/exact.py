"""What a call has to give in float64, and how far from it its roundings to bfloat16 can lead."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fuzz.cases import Case, Tensors
from routing.oracle import select_experts_exactly
from torch import Tensor

from moe.flow import Added, SwigluParams
from moe.gemm.config import ActivationType
from moe.routing.config import RoutingConfig, RoutingMethod
from moe.testing.closeness import BF16_EPSILON
from moe.testing.problems import activated_in_float64

ROUNDINGS = 4  # of the activation, the row of gemm2, the weight and the sum, each of what is at most sum w |W2| |act|
FLOAT32 = 1.1  # what sums in float32 add, at these sizes: far less than a tenth of a rounding
# But where a product is small beside its terms, its error in float32 is of their size: of a sum, times the slope of the activation.
FLOAT32_OF_TERMS = 2.0**-20
MARGIN = 1e-5  # keys nearer than this are told apart by errors of float32


class ExactRouting(NamedTuple):
    expert_ids: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float64
    is_decided: Tensor  # [T]: whether the choice is beyond the errors of float32


def routed_exactly(case: Case, tensors: Tensors) -> ExactRouting:
    """By Python's floats where they take little time and order everything; else by torch's."""
    config, device = case.config().routing, tensors.logits.device
    if device.type != "cpu" or case.weights_seed is not None or case.values in ("nan", "inf"):
        return select_experts_in_float64(tensors.logits, tensors.bias, config)
    exact = select_experts_exactly(tensors.logits, tensors.bias, config)
    shape = (case.num_tokens, case.top_k)
    return ExactRouting(
        torch.tensor(exact.expert_ids, dtype=torch.int64).view(shape),
        torch.tensor(exact.weights, dtype=torch.float64).view(shape),
        torch.full(shape[:1], exact.margin > MARGIN),
    )


def select_experts_in_float64(logits: Tensor, bias: Tensor | None, config: RoutingConfig) -> ExactRouting:
    """All tokens at once: NaN above all numbers, lower ids first among equals. Zeros have no sign, nor NaNs."""
    x = logits.double()
    scores = _scores(x, config)
    if bias is not None and config.method.uses_bias:
        scores = scores + (bias.bfloat16() if config.is_grouped else bias).double()
    keys, is_decided = scores, torch.ones(len(x), dtype=torch.bool, device=x.device)
    if config.is_grouped:
        in_best, is_decided = _in_best_groups(scores, config)
        keys = scores.masked_fill(~in_best, -torch.inf)
    order = keys.sort(dim=1, descending=True, stable=True)
    gaps = order.values[:, : config.top_k + 1].diff(dim=1).neg()  # NaN: of what no error moves
    is_decided &= ~((gaps > 0) & (gaps <= MARGIN)).any(dim=1)
    ids = order.indices[:, : config.top_k]
    return ExactRouting(ids, _weights(x.gather(1, ids), scores.gather(1, ids), config), is_decided)


def _in_best_groups(scores: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
    """[T, E] whether an expert's group is among the best, and [T] whether that is beyond the errors of float32."""
    grouped = scores.unflatten(1, (config.n_group, -1))
    pairs = grouped.sort(dim=2, descending=True).values[..., :2]
    sums = pairs.sum(dim=2)
    best = sums.sort(dim=1, descending=True, stable=True).indices[:, : config.topk_group]
    is_best = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best, True)
    # Sums of other keys that come to the same number do not do so in another precision.
    is_other = (pairs[:, :, None] != pairs[:, None]).any(dim=3)
    is_near = is_other & ((sums[:, :, None] - sums[:, None]).abs() <= MARGIN)
    is_open = (is_near & is_best[:, :, None] & ~is_best[:, None]).flatten(1).any(dim=1)
    return is_best.repeat_interleave(grouped.shape[2], dim=1), ~is_open


def _scores(x: Tensor, config: RoutingConfig) -> Tensor:
    if config.method is RoutingMethod.DEFAULT:
        return x.softmax(dim=1)
    by_sigmoid = (
        RoutingMethod.SIGMOID,
        RoutingMethod.SIGMOID_RENORM,
        RoutingMethod.DEEPSEEK_V3,
        RoutingMethod.MINIMAX2,
    )
    return x.sigmoid() if config.method in by_sigmoid else x


def _weights(chosen: Tensor, scores: Tensor, config: RoutingConfig) -> Tensor:
    sigmoids = chosen.sigmoid()
    total = sigmoids.sum(dim=1, keepdim=True)
    match config.method:
        case RoutingMethod.DEFAULT:
            return scores
        case RoutingMethod.RENORMALIZE | RoutingMethod.RENORMALIZE_NAIVE:
            return chosen.softmax(dim=1)
        case RoutingMethod.TOPK:
            return chosen
        case RoutingMethod.SIGMOID_RENORM if config.norm_topk_prob:
            return sigmoids / total.clamp(min=1e-20)
        case RoutingMethod.DEEPSEEK_V3 | RoutingMethod.MINIMAX2:
            return sigmoids * config.routed_scaling_factor / (total + 1e-20)
        case _:
            return sigmoids


def assert_within_roundings(
    output: Tensor,
    ids: Tensor,
    weights: Tensor,
    case: Case,
    tensors: Tensors,
    *,
    is_finalized: bool = True,
    is_checked: Tensor | None = None,
) -> None:
    """Raise unless each element is as near to float64 as its roundings allow.

    Args:
        ids, weights: [T, K]; the weights without a rounding, or as they were given; those of an input as they were used.
        is_finalized: False where nothing was added yet.
        is_checked: [T], of tokens with finite numbers; None: all of these.
    """
    is_checked = tensors.is_plain if is_checked is None else is_checked & tensors.is_plain
    ids = ids.long()
    exact, bound = (of_each_expert if output.device.type == "cpu" else of_all_experts)(ids, weights, case, tensors)
    if is_finalized and tensors.added is not None:
        added = _gated(tensors.added)
        exact, bound = exact + added, bound + added.abs()
    error = torch.where(is_checked[:, None], (output.double() - exact).abs(), 0.0)
    budget = ROUNDINGS * FLOAT32 * BF16_EPSILON * bound
    is_good = (error <= budget) | ~is_checked[:, None]  # NaN is not
    assert is_good.all(), f"off by {(error / budget.clamp(min=1e-30))[~is_good].max():.2f} budgets"


def of_each_expert(ids: Tensor, weights: Tensor, case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """[T, H] float64: results, and what is rounded on the way to each, expert by expert: a product a slot."""
    exact = torch.zeros(tensors.hidden_states.shape, dtype=torch.float64, device=ids.device)
    bound = torch.zeros_like(exact)
    for local in range(case.num_local):
        token, choice = (ids == local + case.first_local).nonzero(as_tuple=True)
        rows, weight = tensors.hidden_states[token], weights[token, choice, None]
        if case.weight_on == "input":
            rows, weight = (rows.float() * weight.float()).bfloat16(), torch.ones_like(weight)
        row, inner = _rows_of(rows[None], slice(local, local + 1), case, tensors)
        exact.index_add_(0, token, weight.double() * row[0])
        bound.index_add_(0, token, weight.double().abs() * inner[0])
    return exact, bound


def of_all_experts(ids: Tensor, weights: Tensor, case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The same by products of every expert and token, in few launches and without waiting for a GPU."""
    local = ids - case.first_local
    is_local = (local >= 0) & (local < case.num_local)
    local, weights = torch.where(is_local, local, 0), torch.where(is_local, weights.double(), 0.0)
    if case.weight_on == "output":
        rows, inner = _rows_of(tensors.hidden_states[None], slice(None), case, tensors)
        share = rows.new_zeros(len(ids), case.num_local)
        return (
            torch.einsum("te,eth->th", share.scatter_add(1, local, weights), rows),
            torch.einsum("te,eth->th", share.scatter_add(1, local, weights.abs()), inner),
        )
    weighed = (tensors.hidden_states.float()[:, None] * weights.float()[..., None]).bfloat16()  # [T, K, H]
    rows, inner = _rows_of(weighed.flatten(0, 1)[None], slice(None), case, tensors)
    slots = torch.arange(local.numel(), device=ids.device)
    chosen = [torch.where(is_local.view(-1, 1), of[local.view(-1), slots], 0.0) for of in (rows, inner)]
    return tuple(of.view(*ids.shape, case.hidden_size).sum(dim=1) for of in chosen)  # type: ignore[return-value]


def _rows_of(rows: Tensor, experts: slice, case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """[1, n, H] -> [E, n, H] float64 of each of these experts before weights, twice: the rows, and what is rounded on the way."""
    layer = tensors.layer
    w1, w2 = layer.w1[experts].double().mT, layer.w2[experts].double().mT
    first, second = (
        layer.biases[name][experts, None].double() if name in case.biases else w1.new_zeros(()) for name in ("w1", "w2")
    )
    rows = rows.double()
    product, terms = rows @ w1 + first, rows.abs() @ w1.abs() + first.abs()
    expert = torch.arange(case.num_local, device=w1.device)[experts].repeat_interleave(rows.shape[1])
    swiglu = layer.swiglu or SwigluParams()
    flat = product.flatten(0, 1)
    act = activated_in_float64(flat, ActivationType[case.activation], expert, swiglu)
    slope = _slope(flat, terms.flatten(0, 1), case)
    inner = act.abs() + FLOAT32_OF_TERMS / (ROUNDINGS * FLOAT32 * BF16_EPSILON) * slope
    act, inner = (values.view(*product.shape[:2], case.intermediate_size) for values in (act, inner))
    return act @ w2 + second, inner @ w2.abs() + second.abs()


def _gated(added: Added) -> Tensor:
    values, gate = added.values.double(), added.gate
    if isinstance(gate, Tensor):
        return gate.double()[:, None] * values
    return values * (1.0 if gate is None else gate)


def _slope(product: Tensor, terms: Tensor, case: Case) -> Tensor:
    """How much an activation moves, at most, where its input moves by `terms`: no slope is above 2, but that of a square or factor."""
    if not case.is_gated:
        return 2 * terms * (1 + product.abs())
    gate, up = product.abs().chunk(2, dim=1)
    of_gate, of_up = terms.chunk(2, dim=1)
    return 2 * (of_gate * (2 + up) + of_up * (1 + gate))
