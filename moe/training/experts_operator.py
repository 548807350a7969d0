"""Chosen experts under autograd: as operators of torch, forward and backward, or without them where nobody else looks on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from moe.call import LayerCall, check_call
from moe.checks import is_as_expected
from moe.flow import Permutation, RowUnits, TopK
from moe.gemm.numbers import numbers_by_expert
from moe.traced import define, expect_forms, is_plain, is_traced
from moe.training.experts import (
    ExpertGradients,
    GradBuffers,
    Kept,
    Wanted,
    backward_experts,
    forward_experts,
    swiglu_of,
)
from moe.training.known import pipeline_of
from moe.training.route_operator import RefusingMore, refuse_second_derivative

_MAPS = ("row_of_slot", "token_of_row", "expert_of_tile", "row_limit_of_tile", "num_rows", "num_tiles")
_NUM_KEPT = 1 + len(_MAPS)  # gate_up comes first
Parameters = tuple[Tensor | None, Tensor | None, Tensor | None]


def run_experts(
    hidden_states: Tensor,
    topk: TopK,
    w1: Tensor,
    w2: Tensor,
    swiglu: Parameters,
    buffers: GradBuffers,
    pipeline: str,
    *,
    is_checked: bool = False,
) -> Tensor:
    """Chosen experts -> [T, H] bfloat16.

    Args:
        is_checked: whether `check_call` has passed these tensors; a traced call is checked all the same, when it runs.
    """
    differentiable = (hidden_states, topk.weights, w1, w2, *swiglu)
    keeps = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    inputs = (hidden_states, topk.expert_ids, topk.weights, w1, w2, *swiglu)
    output: Tensor
    if not is_plain((*inputs, *buffers)):
        output = torch.ops.moe.training_experts(*inputs, *buffers, pipeline, keeps)[0]
        return output
    training = pipeline_of(pipeline, hidden_states.device)
    if not is_checked:
        _check(training, _call(*inputs))
    if not keeps:
        return forward_experts(training, _call(*inputs), keeps=False)[0]
    output = _Experts.apply(*inputs, *buffers, pipeline, keeps)  # type: ignore[no-untyped-call]
    return output


def parameters_of_all(
    alpha: float | None, beta: float | None, clamp_limit: float | None, num_experts: int, like: Tensor
) -> Parameters:
    """The activation's numbers as `run_experts` takes them; in a traced call made by the program."""
    if is_traced(like):
        return tuple(  # type: ignore[return-value]  # three of them
            None if value is None else torch.full((num_experts,), value, dtype=torch.float32, device=like.device)
            for value in (alpha, beta, clamp_limit)
        )
    swiglu = numbers_by_expert(alpha, beta, clamp_limit, num_experts, like.device)
    return (swiglu.alpha, swiglu.beta, swiglu.clamp_limit) if swiglu else (None, None, None)


def _experts(
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    buffer_w1: Tensor | None,
    buffer_w2: Tensor | None,
    pipeline: str,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what is kept: gate_up and the permutation's maps, empty where they are made anew.

    Args:
        buffer_w1, buffer_w2: for the backward pass alone.
        keeps: whether there may be one.
    """
    call = _call(hidden_states, expert_ids, expert_weights, w1, w2, alpha, beta, clamp_limit)
    training = pipeline_of(pipeline, hidden_states.device)
    _check(training, call)
    with torch.no_grad():
        output, kept = forward_experts(training, call, keeps=keeps)
    return (output, *_kept_tensors(training, call, kept))  # type: ignore[return-value]  # seven of them


def _check(training: Any, call: LayerCall) -> None:
    with torch.no_grad():  # under which a call may have tensors that want gradients
        check_call(training.config, call)


def _kept_tensors(training: Any, call: LayerCall, kept: Kept) -> tuple[Tensor, ...]:
    gate_up, permutation = kept
    if gate_up is None:
        gate_up = call.hidden_states.new_empty(0, training.config.gemm1.weight_rows)
    if permutation is None:
        return (gate_up, *_no_maps(call.entry.expert_ids))
    return (gate_up, *(getattr(permutation, name) for name in _MAPS))


def _call(
    hidden_states: Any,  # None on the way back, where nobody reads it, as w1 is
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Any,
    w2: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
) -> LayerCall:
    topk = TopK(expert_ids, expert_weights)
    return LayerCall(topk, hidden_states, w1, w2, swiglu_of(alpha, beta, clamp_limit), is_chosen=True)


def _no_maps(expert_ids: Tensor) -> list[Tensor]:
    top_k = expert_ids.shape[1]
    return [expert_ids.new_empty(0, top_k), *(expert_ids.new_empty(0) for _ in _MAPS[1:])]


def _fake_experts(
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    buffer_w1: Tensor | None,
    buffer_w2: Tensor | None,
    pipeline: str,
    keeps: bool,
) -> tuple[Tensor, ...]:
    training = pipeline_of(pipeline, hidden_states.device)
    given = {"first": expert_ids, "expert_weights": expert_weights, "hidden_states": hidden_states, "w1": w1, "w2": w2}
    expect_forms(training.config, given | {"alpha": alpha, "beta": beta, "clamp_limit": clamp_limit})
    output, gate_up_columns = torch.empty_like(hidden_states), training.config.gemm1.weight_rows
    if not keeps:
        return (output, hidden_states.new_empty(0, gate_up_columns), *_no_maps(expert_ids))
    num_tokens, top_k = expert_ids.shape
    # Whether they are kept, and how many rows there are, follows from the number of tokens by more than formulas can say.
    slots, rows, tiles, one, gate_up_rows = _sizes_of_kept(training, num_tokens)
    return (
        output,
        hidden_states.new_empty(gate_up_rows, gate_up_columns),
        expert_ids.new_empty(slots, top_k),
        expert_ids.new_empty(rows),
        expert_ids.new_empty(tiles),
        expert_ids.new_empty(tiles),
        expert_ids.new_empty(one),
        expert_ids.new_empty(one),
    )


def _sizes_of_kept(training: Any, num_tokens: Any) -> tuple[Any, ...]:
    """Of slots' tokens, rows, tiles, counts, and rows of gate_up."""
    if not isinstance(num_tokens, int):
        ctx = library.get_ctx()
        return tuple(ctx.new_dynamic_size() for _ in range(5))
    forward = training.at(num_tokens)
    if num_tokens <= forward.ready.max_fused_tokens:
        return 0, 0, 0, 0, 0
    permute = forward.config.permute
    rows, tile_rows = permute.max_rows(num_tokens), permute.rows_per_tile(num_tokens)
    return num_tokens, rows, rows // tile_rows, 1, rows if training.keeps_gate_up(num_tokens) else 0


def _experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    kept: Sequence[Tensor],
    pipeline: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One tensor for each field of Wanted, empty where it is not wanted."""
    call = _call(hidden_states, expert_ids, expert_weights, w1, w2, alpha, beta, clamp_limit)
    grads = _backward(grad_output, call, kept, pipeline, Wanted(*wanted), GradBuffers())
    return _with_empties(grads, grad_output)


def _backward(
    grad_output: Tensor,
    call: LayerCall,
    kept: Sequence[Tensor],
    pipeline: str,
    wanted: Wanted,
    buffers: GradBuffers,
    units: RowUnits | None = None,
) -> ExpertGradients:
    training = pipeline_of(pipeline, grad_output.device)
    gate_up, _, *maps = kept
    permutation = None
    if maps[-1].shape[0]:
        num_rows, num_tiles = maps[0].shape[0], maps[1].shape[0]
        permute = training.at(call.num_tokens).config.permute
        # By what was kept: another tile may have been tuned since.
        tile_rows = num_rows // num_tiles if num_tiles else permute.rows_per_tile(call.num_tokens)
        mean_rows = permute.mean_rows(call.num_tokens)
        maps_by_name: dict[str, Any] = dict(zip(_MAPS, kept[1:]))
        permutation = Permutation(**maps_by_name, tile_rows=tile_rows, mean_rows=mean_rows, units=units)
    has_gate_up = permutation is not None and gate_up.shape[0] == permutation.max_rows
    before = Kept(gate_up if has_gate_up else None, permutation)
    grad_output = grad_output.contiguous()
    if not is_as_expected(grad_output, tuple(grad_output.shape), grad_output.dtype):  # memory that begins anywhere
        grad_output = grad_output.clone()
    with torch.no_grad():
        return backward_experts(training, grad_output, call, before, wanted, buffers)


def _with_empties(grads: Sequence[Tensor | None], like: Tensor) -> Any:
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _experts_backward_into(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    kept: Sequence[Tensor],
    buffer_w1: Tensor | None,
    buffer_w2: Tensor | None,
    pipeline: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same, with weights' gradients added to the buffers that there are, and empty."""
    call = _call(hidden_states, expert_ids, expert_weights, w1, w2, alpha, beta, clamp_limit)
    grads = _backward(grad_output, call, kept, pipeline, Wanted(*wanted), GradBuffers(buffer_w1, buffer_w2))
    return _with_empties(grads, grad_output)


def _fake_backward(grad_output: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(grad_output, others[:8], others[-2], others[-1], (None, None))


def _fake_backward_into(grad_output: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(grad_output, others[:8], others[-2], others[-1], others[-4:-2])


def _empty_gradients(
    grad_output: Tensor, inputs: Sequence[Any], pipeline: str, wanted: Sequence[bool], buffers: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Of the operator's inputs from hidden_states to clamp_limit, in the order of Wanted."""
    config = pipeline_of(pipeline, grad_output.device).config
    _, _, expert_weights, _, _, *parameters = inputs
    likes = (
        grad_output.new_empty(grad_output.shape),
        torch.empty_like(expert_weights),
        grad_output.new_empty(config.gemm1.weight_shape),
        grad_output.new_empty(config.gemm2.weight_shape),
        *parameters,
    )
    is_returned = [*wanted[:2], wanted[2] and buffers[0] is None, wanted[3] and buffers[1] is None, *wanted[4:]]
    return _with_empties(
        [torch.empty_like(like) if is_here else None for like, is_here in zip(likes, is_returned)], grad_output
    )


def _keep_for_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _keep(ctx: Any, inputs: tuple[Any, ...], kept: tuple[Tensor, ...], units: RowUnits | None = None) -> None:
    """Inputs by reference, and of them only what some gradient is made of. Units, if any, with the maps that they are made of."""
    x, ids, weights, w1, w2, alpha, beta, clamp_limit, *ctx.buffers, ctx.pipeline, _ = inputs
    wanted = _wanted(ctx)
    # Of a number that is not known yet, gate_up may have to be made anew.
    num_kept = kept[0].shape[0]
    is_kept = isinstance(num_kept, int) and num_kept > 0
    x = x if wanted.w1 or not is_kept else None
    w1 = w1 if wanted.hidden_states or not is_kept else None
    ctx.units = None if units is None else (units.size, units.stream)
    of_units = () if units is None else (units.records, units.counts)
    ctx.save_for_backward(x, ids, weights, w1, w2, alpha, beta, clamp_limit, *kept, *of_units)


def _wanted(ctx: Any) -> Wanted:
    x, _, weights, w1, w2, alpha, beta, clamp_limit, *_ = ctx.needs_input_grad
    return Wanted(x, weights, w1, w2, alpha, beta, clamp_limit)


def _backward_of_experts(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 12
    if grad_output is None:
        return nothing
    saved, wanted = ctx.saved_tensors, _wanted(ctx)
    inputs, kept, units = saved[:8], list(saved[8 : 8 + _NUM_KEPT]), saved[8 + _NUM_KEPT :]
    buffers = [buffer if is_wanted else None for buffer, is_wanted in zip(ctx.buffers, (wanted.w1, wanted.w2))]
    has_buffers = any(buffer is not None for buffer in buffers)
    plainly = is_plain((grad_output, *saved, *buffers))
    if plainly:
        made = RowUnits(*units, *ctx.units) if units else None
        grads = _backward(grad_output, _call(*inputs), kept, ctx.pipeline, wanted, GradBuffers(*buffers), made)
        for buffer in buffers:
            if buffer is not None:
                torch.autograd.graph.increment_version(buffer)
    elif has_buffers:
        with torch.no_grad():  # an operator that writes can have no autograd of its own, and torch would only warn
            grads = torch.ops.moe.training_experts_backward_into(
                grad_output, *inputs, kept, *buffers, ctx.pipeline, list(wanted)
            )
    else:
        grads = torch.ops.moe.training_experts_backward(grad_output, *inputs, kept, ctx.pipeline, list(wanted))
    if (plainly or has_buffers) and torch.is_grad_enabled():  # for a second derivative
        differentiable = (grad_output, inputs[0], *inputs[2:])
        grads = RefusingMore.apply(len(grads), *grads, *differentiable)  # type: ignore[no-untyped-call]
    is_returned = list(wanted)
    is_returned[2:4] = [is_wanted and buffer is None for is_wanted, buffer in zip(is_returned[2:4], buffers)]
    x, weights, w1, w2, *parameters = (grad if is_here else None for grad, is_here in zip(grads, is_returned))
    return x, None, weights, w1, w2, *parameters, None, None, None, None


class _Experts(torch.autograd.Function):
    """The operator without torch's dispatcher, of a call that was checked: that takes longer than all of its launches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, _, _, pipeline, keeps = inputs
        call = _call(*tensors)
        training = pipeline_of(pipeline, call.hidden_states.device)
        output, kept = forward_experts(training, call, keeps=keeps)
        units = None if kept.permutation is None else kept.permutation.units
        _keep(ctx, inputs, _kept_tensors(training, call, kept), units)
        ctx.set_materialize_grads(False)
        return output

    backward = staticmethod(_backward_of_experts)


define("training_experts", library.infer_schema(_experts, mutates_args=()), _experts, _fake_experts)
define(
    "training_experts_backward",
    library.infer_schema(_experts_backward, mutates_args=()),
    _experts_backward,
    _fake_backward,
)
define(
    "training_experts_backward_into",
    library.infer_schema(_experts_backward_into, mutates_args=("buffer_w1", "buffer_w2")),
    _experts_backward_into,
    _fake_backward_into,
)
library.register_autograd("moe::training_experts", _backward_of_experts, setup_context=_keep_for_experts)
library.register_autograd("moe::training_experts_backward", refuse_second_derivative)
