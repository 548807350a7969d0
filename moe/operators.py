"""The layer as operators of torch: what compiled, exported and fake-tensor programs call in the place of Python code."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from moe.call import LayerCall
from moe.config import MoEConfig
from moe.expert_ids import as_int32_ids
from moe.flow import ExpertOutputs, SwigluParams, TopK
from moe.gemm.config import WeightFormat, WeightLayout
from moe.tuning.tuned import TunedPipeline, tuned_pipeline


def is_traced(tensor: Tensor) -> bool:
    """Whether a call with this tensor only asks what its result would be: then the operator answers, and no code of ours runs."""
    is_other = type(tensor) is not Tensor  # told first: every eager call asks
    return (
        torch.compiler.is_dynamo_compiling()
        or tensor.is_meta
        or (is_other and isinstance(tensor, (FakeTensor, FunctionalTensor)))
    )


def run_experts(
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    alpha: float | None = None,
    beta: float | None = None,
    clamp_limit: float | None = None,
) -> Tensor:
    """Chosen experts whose weights are all here: hidden_states [..., H] bfloat16 -> the same shape.

    Args:
        expert_ids: [T, K] of any integer dtype; ids outside [0, E) are skipped.
        expert_weights: [T, K] of any floating dtype.
        w1, w2: bfloat16, MajorK or MajorMn.
        activation, weight_layout: numbers of ActivationType and WeightLayout.
        alpha, beta, clamp_limit: as in SwigluParams, of all experts alike.
    """
    layer = (activation, weight_layout, is_batch_invariant, alpha, beta, clamp_limit)
    return _run(None, hidden_states, expert_ids, expert_weights, w1, w2, *layer)


def _run(
    output: Tensor | None,
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    alpha: float | None,
    beta: float | None,
    clamp_limit: float | None,
) -> Tensor:
    num_local_experts, hidden_size, intermediate_size = w2.shape
    if weight_layout == WeightLayout.MajorMn:
        hidden_size, intermediate_size = intermediate_size, hidden_size
    device = hidden_states.device
    pipeline = _pipeline(
        hidden_size,
        intermediate_size,
        num_local_experts,
        expert_ids.shape[-1],
        activation,
        weight_layout,
        is_batch_invariant,
        device,
    )
    if expert_weights.dtype not in (torch.bfloat16, torch.float32):
        expert_weights = expert_weights.float()
    topk = TopK(as_int32_ids(expert_ids, num_local_experts), expert_weights.contiguous())
    swiglu = None
    if alpha is not None or beta is not None or clamp_limit is not None:
        parameters = (_of_all_experts(value, num_local_experts, device) for value in (alpha, beta, clamp_limit))
        swiglu = SwigluParams(*parameters)
    tokens = hidden_states.reshape(-1, hidden_size).contiguous()
    return pipeline.run_experts(topk, tokens, w1, w2, swiglu=swiglu, output=output).view(hidden_states.shape)


def run_experts_into(
    output: Tensor | None, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor, *others: Any
) -> Tensor:
    """`run_experts` into memory of its own [T, H] bfloat16, where given; traced as the operator and a copy."""
    if not is_traced(hidden_states):
        return _run(output, hidden_states, expert_ids, expert_weights, *others)
    result = torch.ops.moe.run_experts(hidden_states, expert_ids, expert_weights, *others)
    return result if output is None else output.copy_(result)


_run_experts_operator = library.custom_op("moe::run_experts", run_experts, mutates_args=())


@_run_experts_operator.register_fake
def _(hidden_states: Tensor, *_others: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@cache
def _pipeline(
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    top_k: int,
    activation: int,
    weight_layout: int,
    is_batch_invariant: bool,
    device: torch.device,
) -> TunedPipeline:
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        # A rank may hold fewer experts than a token chooses; the ids beyond its own are then experts elsewhere.
        num_experts=max(num_local_experts, top_k),
        num_local_experts=num_local_experts,
        top_k=top_k,
        activation=activation,
        weight_format=WeightFormat(layout=WeightLayout(weight_layout)),
        is_batch_invariant=is_batch_invariant,
    )
    return tuned_pipeline(config, device)


def _of_all_experts(value: float | None, num_experts: int, device: torch.device) -> Tensor | None:
    """[E] float32, kept, unless a CUDA graph is captured: it would own the memory."""
    if value is None:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _filled.__wrapped__(value, num_experts, device)
    return _filled(value, num_experts, device)


@cache
def _filled(value: float, num_experts: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be read under any mode
        return torch.full((num_experts,), value, dtype=torch.float32, device=device)


def run_traced(pipeline: TunedPipeline, call: LayerCall) -> Tensor:
    """`pipeline.run(call)` as the operator moe::run_layer; a workspace has no part in what the result is."""
    if call.output is not None:
        _expect_output(call.output, call.hidden_states)
    result = torch.ops.moe.run_layer(*_arguments(pipeline, call))
    return result if call.output is None else call.output.copy_(result)


def _expect_output(output: Tensor, hidden_states: Tensor) -> None:
    """The copy would convert and broadcast."""
    if output.shape != hidden_states.shape:
        raise ValueError(
            f"output: expected {list(hidden_states.shape)}, got {list(output.shape)}; pass a tensor of that shape"
        )
    if output.dtype != torch.bfloat16 or output.device != hidden_states.device:
        raise ValueError(
            f"output: expected bfloat16 on {hidden_states.device}, got {output.dtype} on {output.device}; convert or move it"
        )


def run_traced_unfinalized(pipeline: TunedPipeline, call: LayerCall) -> ExpertOutputs:
    """`pipeline.run_unfinalized(call)` as the operator moe::run_layer_unfinalized."""
    rows, weights, row_of_slot = torch.ops.moe.run_layer_unfinalized(*_arguments(pipeline, call))
    are_the_callers = call.is_chosen and not pipeline.config.weighs_input
    return ExpertOutputs(rows, call.entry.weights if are_the_callers else weights, row_of_slot)


def _arguments(pipeline: TunedPipeline, call: LayerCall) -> tuple[Any, ...]:
    entry = (call.entry.expert_ids, call.entry.weights) if call.is_chosen else (call.entry, None)
    swiglu = call.swiglu or SwigluParams()
    tensors = (call.hidden_states, call.w1, call.w2)
    numbers = (call.bias, swiglu.alpha, swiglu.beta, swiglu.clamp_limit, call.w1_bias, call.w2_bias)
    layer = (pipeline.config.model_dump_json(), pipeline.uses_pdl, pipeline.max_num_tokens)
    return (*entry, *tensors, *numbers, call.routing_replay_out, *layer)


def run_layer(
    first: Tensor,
    expert_weights: Tensor | None,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    config: str,
    uses_pdl: bool,
    max_num_tokens: int,
) -> Tensor:
    """A layer -> [T, H] bfloat16.

    Args:
        first: logits [T, E]; where `expert_weights` is given, ids [T, K] int32.
        config: a MoEConfig as JSON; the rest as `tuned_pipeline` and `MoEPipeline` have it.
    """
    pipeline = _pipeline_of_json(config, uses_pdl, max_num_tokens, hidden_states.device)
    numbers = (bias, alpha, beta, clamp_limit, w1_bias, w2_bias)
    return pipeline.run(_call(first, expert_weights, hidden_states, w1, w2, *numbers, routing_replay_out))


def run_layer_unfinalized(
    first: Tensor,
    expert_weights: Tensor | None,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    config: str,
    uses_pdl: bool,
    max_num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, stopped before finalize: rows [P, H], weights [T, K] bfloat16 and row_of_slot [T, K] int32."""
    pipeline = _pipeline_of_json(config, uses_pdl, max_num_tokens, hidden_states.device)
    numbers = (bias, alpha, beta, clamp_limit, w1_bias, w2_bias)
    outputs = pipeline.run_unfinalized(
        _call(first, expert_weights, hidden_states, w1, w2, *numbers, routing_replay_out)
    )
    # An operator returns no tensor that it was given.
    return outputs.rows, outputs.weights if expert_weights is None else outputs.weights.clone(), outputs.row_of_slot


_run_layer_operator = library.custom_op("moe::run_layer", run_layer, mutates_args=("routing_replay_out",))
_run_layer_unfinalized_operator = library.custom_op(
    "moe::run_layer_unfinalized", run_layer_unfinalized, mutates_args=("routing_replay_out",)
)


@_run_layer_operator.register_fake
def _(first: Tensor, expert_weights: Tensor | None, hidden_states: Tensor, *others: Any) -> Tensor:
    _expect_fit(first, expert_weights, hidden_states, *others)
    return hidden_states.new_empty(hidden_states.shape)


@_run_layer_unfinalized_operator.register_fake
def _(
    first: Tensor, expert_weights: Tensor | None, hidden_states: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    config = _expect_fit(first, expert_weights, hidden_states, *others)
    num_tokens, top_k = hidden_states.shape[0], config.top_k
    # How many rows there are follows from the number of tokens, by more than a formula of symbols can say.
    is_known = isinstance(num_tokens, int)
    rows = config.permute.max_rows(num_tokens) if is_known else library.get_ctx().new_dynamic_size()
    weights = hidden_states.new_empty(num_tokens, top_k)
    if expert_weights is not None:
        weights = torch.empty_like(expert_weights)
    row_of_slot = hidden_states.new_empty(num_tokens, top_k, dtype=torch.int32)
    return hidden_states.new_empty(rows, config.hidden_size), weights, row_of_slot


def _call(
    first: Tensor,
    expert_weights: Tensor | None,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    routing_replay_out: Tensor | None,
) -> LayerCall:
    entry = first if expert_weights is None else TopK(first, expert_weights)
    has_swiglu = alpha is not None or beta is not None or clamp_limit is not None
    swiglu = SwigluParams(alpha, beta, clamp_limit) if has_swiglu else None
    is_chosen = expert_weights is not None
    tensors = (entry, hidden_states, w1, w2, swiglu, bias, None, routing_replay_out)
    return LayerCall(*tensors, is_chosen, w1_bias=w1_bias, w2_bias=w2_bias)


@cache
def _pipeline_of_json(config: str, uses_pdl: bool, max_num_tokens: int, device: torch.device) -> TunedPipeline:
    return tuned_pipeline(
        MoEConfig.model_validate_json(config), device, uses_pdl=uses_pdl, max_num_tokens=max_num_tokens
    )


def _expect_fit(
    first: Tensor,
    expert_weights: Tensor | None,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    clamp_limit: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    config_json: str,
    *_: Any,
) -> MoEConfig:
    """Raise unless tensors that have no memory have the sizes, dtypes and device of a call. Those that have are checked by the call."""
    config = MoEConfig.model_validate_json(config_json)
    num_tokens, num_local = hidden_states.shape[0], (config.permute.num_local_experts,)
    either, whole = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    wanted: list[tuple[str, Tensor | None, tuple[Any, ...], tuple[torch.dtype, ...]]] = [
        ("hidden_states", hidden_states, (num_tokens, config.hidden_size), whole),
        ("gemm1_weights", w1, config.gemm1.weight_shape, whole),
        ("gemm2_weights", w2, config.gemm2.weight_shape, whole),
        ("routing_bias", bias, (config.num_experts,), either),
        ("gemm1_alpha", alpha, num_local, (torch.float32,)),
        ("gemm1_beta", beta, num_local, (torch.float32,)),
        ("gemm1_clamp_limit", clamp_limit, num_local, (torch.float32,)),
        ("gemm1_bias", w1_bias, (*num_local, config.gemm1.weight_rows), either),
        ("gemm2_bias", w2_bias, (*num_local, config.gemm2.weight_rows), either),
    ]
    if expert_weights is None:
        wanted.append(("routing_logits", first, (num_tokens, config.num_experts), either))
    else:
        wanted.append(("expert_indices", first, (num_tokens, config.top_k), (torch.int32,)))
        wanted.append(("expert_weights", expert_weights, (num_tokens, config.top_k), either))
    if routing_replay_out is not None:
        shape = (routing_replay_out.shape[0], config.top_k)
        wanted.append(("routing_replay_out", routing_replay_out, shape, (torch.int16,)))
    for name, tensor, shape, dtypes in wanted:
        if tensor is None:
            continue
        if len(tensor.shape) != len(shape) or any(size != other for size, other in zip(tensor.shape, shape)):
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}; pass a tensor of that shape")
        if tensor.dtype not in dtypes or tensor.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {hidden_states.device}, got {tensor.dtype} on "
                f"{tensor.device}; convert or move it"
            )
    return config
