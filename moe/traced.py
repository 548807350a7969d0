"""A pipeline's calls as operators of torch: what compiled, exported and fake-tensor programs hold in the place of Python code.

They return new tensors and write none that they are given: what a caller's tensor is to hold is copied into it beside the operator,
where a compiler sees it.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from moe.call import LayerCall, read_tensors, refuse_gradients_of
from moe.checks import as_float, expect_type
from moe.config import MoEConfig
from moe.flow import Added, ExpertOutputs, SwigluParams, TopK


class Runner(Protocol):
    """What runs a call: a MoEPipeline, or one that picks among several."""

    @property
    def config(self) -> MoEConfig: ...
    def run(self, call: LayerCall) -> Tensor: ...
    def run_unfinalized(self, call: LayerCall) -> ExpertOutputs: ...


_MAKERS: dict[str, Callable[..., Any]] = {}
# Pipelines of a user's own stages, which no text can make again. Their names hold in this process only.
_KEPT: WeakValueDictionary[str, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()
_PROCESS = secrets.token_hex(4)
_UNCHECKED = "kept, unchecked"


def is_traced(tensor: Tensor) -> bool:
    """Whether a call with this tensor only asks what its result would be: then the operator answers, and no code of ours runs."""
    if type(tensor) is Tensor:  # told first: every eager call asks
        return torch.compiler.is_dynamo_compiling() or tensor.is_meta
    if not isinstance(tensor, Tensor):  # which the call refuses
        return False
    return torch.compiler.is_dynamo_compiling() or tensor.is_meta or isinstance(tensor, (FakeTensor, FunctionalTensor))


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody but autograd looks at a call of these tensors: none is traced or of a subclass, and no mode or transform is on.

    Such a call needs no operator. One with gradients costs more of the host's time than the launches within it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._len_torch_function_stack() and not _modes_only_say_where_tensors_are_made():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is not None and ((type(tensor) is not Tensor and type(tensor) is not Parameter) or tensor.is_meta):
            return False
    return True


def _modes_only_say_where_tensors_are_made() -> bool:
    """Whether there is none but that of `torch.set_default_device`, which stays on for as long as a program runs."""
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def add_maker(name: str, make: Callable[..., Any]) -> None:
    """Have recipes called `name` followed by `make(config, device, **numbers)`."""
    _MAKERS[name] = make


def recipe_of(maker: str, config: MoEConfig, **numbers: int) -> str:
    """The text that an operator takes for a pipeline: what makes it again, in any process, by a maker's name."""
    return json.dumps({"maker": maker, "config": json.loads(config.model_dump_json())} | numbers)


def keep(pipeline: Runner, *, is_checked: bool) -> str:
    """The same for a pipeline that only this process has, as long as it lives.

    Args:
        is_checked: whether its tensors must be what its config says.
    """
    name = f"{'kept' if is_checked else _UNCHECKED} {_PROCESS}.{next(_NUMBERS)}"
    _KEPT[name] = pipeline
    return name


def is_kept(recipe: str) -> bool:
    """Whether it names a pipeline that only this process has. A copy of one, whose stages are copies too, needs a name of its own."""
    return not recipe.startswith("{")


def pipeline_of(recipe: str, device: torch.device) -> Runner:
    """The pipeline that a recipe names.

    Raises:
        ValueError: one that was kept, and is gone.
    """
    if not is_kept(recipe):
        return _made(recipe, device)
    pipeline: Runner | None = _KEPT.get(recipe)
    if pipeline is None:
        raise ValueError(
            f"pipeline: expected one that lives in this process, got {recipe!r}, which does not; keep a pipeline with stages of your "
            "own as long as what was compiled with it, and export one of moe.build_pipeline or moe.tuning.tuned_pipeline"
        )
    return pipeline


@cache
def _made(recipe: str, device: torch.device) -> Runner:
    numbers = json.loads(recipe)
    config = MoEConfig.model_validate_json(json.dumps(numbers.pop("config")))
    made: Runner = _MAKERS[numbers.pop("maker")](config, device, **numbers)
    return made


def run_traced(recipe: str, call: LayerCall) -> Tensor:
    """`pipeline.run(call)` as the operator moe::run_layer; a workspace has no part in what the result is."""
    expect_kinds(call)
    _expect_no_gradients(call)
    if call.output is not None:
        _expect_output(call.output, call.hidden_states)
    replay_out = call.routing_replay_out
    result, *chosen = torch.ops.moe.run_layer(*_arguments_of(call), recipe, replay_out is not None)
    if replay_out is not None:
        _copy_chosen(chosen[0], replay_out)
    return result if call.output is None else call.output.copy_(result)


def run_traced_unfinalized(recipe: str, call: LayerCall) -> ExpertOutputs:
    """`pipeline.run_unfinalized(call)` as the operator moe::run_layer_unfinalized."""
    expect_kinds(call)
    _expect_no_gradients(call)
    replay_out = call.routing_replay_out
    rows, row_of_slot, *others = torch.ops.moe.run_layer_unfinalized(
        *_arguments_of(call), recipe, replay_out is not None
    )
    if replay_out is not None:
        _copy_chosen(others[-1], replay_out)
    has_weights = len(others) > (replay_out is not None)
    return ExpertOutputs(rows, others[0] if has_weights else call.entry.weights, row_of_slot)


def expect_kinds(call: LayerCall) -> None:
    """Raise TypeError for a value that the call refuses whatever its numbers: the operator would do so in torch's words."""
    if call.is_chosen:
        expect_type("topk", call.entry, TopK, "moe.TopK(expert_ids, weights) makes one")
    if call.swiglu is not None:
        expect_type("swiglu", call.swiglu, SwigluParams, "moe.SwigluParams(alpha, beta, clamp_limit) makes one")
    if call.added is not None and not isinstance(call.added.gate, (Tensor, type(None))):
        as_float("added.gate", call.added.gate, "a tensor [T] or a number")
    tensors = read_tensors(call, "expert_indices" if call.is_chosen else "routing_logits")
    tensors |= {"output": call.output, "routing_replay_out": call.routing_replay_out}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _NEEDED):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; pass a tensor")


_NEEDED = ("expert_indices", "routing_logits", "hidden_states", "gemm1_weights", "gemm2_weights")


def _expect_no_gradients(call: LayerCall) -> None:
    """As the call itself, which a compiled program without a backward runs where no gradient is recorded."""
    if torch.is_grad_enabled():
        refuse_gradients_of(call)


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


def _copy_chosen(chosen: Tensor, replay_out: Tensor) -> None:
    num_tokens, top_k = chosen.shape
    if replay_out.dim() != 2 or replay_out.shape[0] < num_tokens or replay_out.shape[1] != top_k:
        raise ValueError(
            f"routing_replay_out: expected [{num_tokens} or more, {top_k}], got {list(replay_out.shape)}; pass a tensor of that shape"
        )
    if replay_out.dtype != torch.int16 or replay_out.device != chosen.device:
        raise ValueError(
            f"routing_replay_out: expected torch.int16 on {chosen.device}, got {replay_out.dtype} on {replay_out.device}; "
            "convert or move it"
        )
    # Whole: where only a part is written, inductor drops copies that are taken of it between two writes (torch 2.13).
    replay_out.copy_(torch.cat((chosen, replay_out[num_tokens:])))


# A call as the operators take it. `_arguments_of` and `_call_of` say what each is of a LayerCall, `_wanted` the form of a tensor.
_ARGUMENTS = {
    "first": "Tensor",  # logits; where there are expert_weights, expert_ids
    "expert_weights": "Tensor?",
    "hidden_states": "Tensor",
    "w1": "Tensor",
    "w2": "Tensor",
    "bias": "Tensor?",
    "alpha": "Tensor?",
    "beta": "Tensor?",
    "clamp_limit": "Tensor?",
    "w1_bias": "Tensor?",
    "w2_bias": "Tensor?",
    "added": "Tensor?",
    "added_gate": "Tensor?",
    "added_scale": "float?",  # a gate that is one number
}
_SCHEMA = (
    "("
    + "".join(f"{kind} {name}, " for name, kind in _ARGUMENTS.items())
    + "str recipe, bool wants_chosen) -> Tensor[]"
)


def _arguments_of(call: LayerCall) -> tuple[Any, ...]:
    entry = (call.entry.expert_ids, call.entry.weights) if call.is_chosen else (call.entry, None)
    tensors = (call.hidden_states, call.w1, call.w2, call.bias)
    swiglu, added = call.swiglu, call.added
    numbers = (None, None, None) if swiglu is None else (swiglu.alpha, swiglu.beta, swiglu.clamp_limit)
    addend: tuple[Any, ...] = (None, None, None)
    if added is not None:
        gate = added.gate
        is_tensor = isinstance(gate, Tensor)
        addend = (added.values, gate if is_tensor else None, None if gate is None or is_tensor else float(gate))
    return (*entry, *tensors, *numbers, call.w1_bias, call.w2_bias, *addend)


def _call_of(given: dict[str, Any], chosen: Tensor | None) -> LayerCall:
    first, expert_weights, values = given["first"], given["expert_weights"], given["added"]
    numbers = [given[name] for name in ("alpha", "beta", "clamp_limit")]
    gate = given["added_scale"] if given["added_gate"] is None else given["added_gate"]
    return LayerCall(
        entry=first if expert_weights is None else TopK(first, expert_weights),
        hidden_states=given["hidden_states"],
        w1=given["w1"],
        w2=given["w2"],
        swiglu=None if all(value is None for value in numbers) else SwigluParams(*numbers),
        bias=given["bias"],
        routing_replay_out=chosen,
        is_chosen=expert_weights is not None,
        added=None if values is None else Added(values, gate),
        w1_bias=given["w1_bias"],
        w2_bias=given["w2_bias"],
    )


def run_layer(*arguments: Any) -> list[Tensor]:
    """The layer's [T, H] bfloat16, and where wanted the chosen ids [T, K] int16. Arguments as `_ARGUMENTS` and the schema say."""
    pipeline, call = _prepared(arguments)
    return _with_chosen([pipeline.run(call)], call)


def run_layer_unfinalized(*arguments: Any) -> list[Tensor]:
    """Rows [P, H], row_of_slot [T, K] int32, weights [T, K] unless they are the caller's; where wanted the chosen ids [T, K] int16."""
    pipeline, call = _prepared(arguments)
    outputs = pipeline.run_unfinalized(call)
    if not call.hidden_states.is_cuda:
        _zero_unnamed(outputs)
    results = [outputs.rows, outputs.row_of_slot]
    return _with_chosen(
        results if _are_the_callers(pipeline.config, call.is_chosen) else [*results, outputs.weights], call
    )


def _are_the_callers(config: MoEConfig, is_chosen: bool) -> bool:
    """Whether the weights that go with rows are those that were given, which an operator may not return."""
    return is_chosen and not config.weighs_input


def _zero_unnamed(outputs: ExpertOutputs) -> None:
    """Rows that no slot names hold what the memory held, and torch's checks of an operator compare two runs of it."""
    is_named = torch.zeros(len(outputs.rows), dtype=torch.bool, device=outputs.rows.device)
    is_named[outputs.row_of_slot[outputs.row_of_slot >= 0].long()] = True
    outputs.rows[~is_named] = 0


def _prepared(arguments: tuple[Any, ...]) -> tuple[Runner, LayerCall]:
    given = dict(zip(_ARGUMENTS, arguments))
    recipe, wants_chosen = arguments[len(_ARGUMENTS) :]
    hidden_states = given["hidden_states"]
    pipeline = pipeline_of(recipe, hidden_states.device)
    form = (hidden_states.shape[0], pipeline.config.top_k)
    return pipeline, _call_of(given, hidden_states.new_empty(form, dtype=torch.int16) if wants_chosen else None)


def _with_chosen(results: list[Tensor], call: LayerCall) -> list[Tensor]:
    return results if call.routing_replay_out is None else [*results, call.routing_replay_out]


_LIBRARY = library.Library("moe", "FRAGMENT")  # as long as this lives, so do the operators


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The operator moe::name: `run` on tensors, `fake` on those without memory.

    `library.custom_op` is 25 us of Python more, around every call of a compiled program.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    library.register_fake(f"moe::{name}", fake, lib=_LIBRARY)


def _fake_layer(*arguments: Any) -> list[Tensor]:
    config, given, wants_chosen = _expect_fit(arguments)
    hidden_states = given["hidden_states"]
    result = hidden_states.new_empty(hidden_states.shape)
    chosen = hidden_states.new_empty(hidden_states.shape[0], config.top_k, dtype=torch.int16)
    return [result, chosen] if wants_chosen else [result]


def _fake_unfinalized(*arguments: Any) -> list[Tensor]:
    config, given, wants_chosen = _expect_fit(arguments)
    new, num_tokens = given["hidden_states"].new_empty, given["hidden_states"].shape[0]
    rows = new(_num_rows(config, num_tokens), config.hidden_size)
    results = [rows, new(num_tokens, config.top_k, dtype=torch.int32)]
    weights = given["expert_weights"]
    if not _are_the_callers(config, weights is not None):
        results.append(new(num_tokens, config.top_k, dtype=torch.bfloat16 if weights is None else weights.dtype))
    return [*results, new(num_tokens, config.top_k, dtype=torch.int16)] if wants_chosen else results


def _num_rows(config: MoEConfig, num_tokens: int) -> int:
    """P. It follows from the tiles of the tokens' bucket, by more than a formula of symbols can say, and a table may change it."""
    try:
        number: Any = library.get_ctx().new_dynamic_size()
    except (DynamicOutputShapeException, NotImplementedError, RuntimeError):  # where nothing is compiled
        return config.permute.max_rows(num_tokens)
    return number


def _expect_fit(arguments: tuple[Any, ...]) -> tuple[MoEConfig, dict[str, Any], bool]:
    """Raise unless tensors that have no memory have the sizes, dtypes and device of a call. Those that have are checked by the call."""
    given = dict(zip(_ARGUMENTS, arguments))
    recipe, wants_chosen = arguments[len(_ARGUMENTS) :]
    device, num_tokens = given["hidden_states"].device, given["hidden_states"].shape[0]
    config = _config_of(recipe, device)
    if isinstance(num_tokens, int):
        config.permute.check_num_tokens(num_tokens)
    if not recipe.startswith(_UNCHECKED):
        expect_forms(config, given)
    return config, given, wants_chosen


def expect_forms(config: MoEConfig, given: Mapping[str, Any]) -> None:
    """Raise ValueError unless these tensors, by `_ARGUMENTS`' names, have the sizes, dtypes and device of a call; None is left out."""
    device = given["hidden_states"].device
    for name, argument, shape, dtypes in _wanted(config, given):
        tensor = given.get(argument)
        if tensor is None:
            continue
        if len(tensor.shape) != len(shape) or any(size != other for size, other in zip(tensor.shape, shape)):
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}; pass a tensor of that shape")
        if tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {device}, got {tensor.dtype} on "
                f"{tensor.device}; convert or move it"
            )


@cache
def _config_of(recipe: str, device: torch.device) -> MoEConfig:
    if is_kept(recipe):
        return pipeline_of(recipe, device).config
    return MoEConfig.model_validate_json(json.dumps(json.loads(recipe)["config"]))


def _wanted(
    config: MoEConfig, given: Mapping[str, Any]
) -> list[tuple[str, str, tuple[Any, ...], tuple[torch.dtype, ...]]]:
    """The name of a tensor as callers know it, ours, its shape and its dtypes."""
    num_tokens, num_local = given["hidden_states"].shape[0], (config.permute.num_local_experts,)
    either, whole, single = (torch.float32, torch.bfloat16), (torch.bfloat16,), (torch.float32,)
    entry: list[tuple[str, str, tuple[Any, ...], tuple[torch.dtype, ...]]]
    if given["expert_weights"] is None:
        entry = [("routing_logits", "first", (num_tokens, config.num_experts), either)]
    else:
        choices = (num_tokens, config.top_k)
        entry = [
            ("expert_indices", "first", choices, (torch.int32,)),
            ("expert_weights", "expert_weights", choices, either),
        ]
    return [
        *entry,
        ("hidden_states", "hidden_states", (num_tokens, config.hidden_size), whole),
        ("gemm1_weights", "w1", config.gemm1.weight_shape, whole),
        ("gemm2_weights", "w2", config.gemm2.weight_shape, whole),
        ("routing_bias", "bias", (config.num_experts,), either),
        ("gemm1_alpha", "alpha", num_local, single),
        ("gemm1_beta", "beta", num_local, single),
        ("gemm1_clamp_limit", "clamp_limit", num_local, single),
        ("gemm1_bias", "w1_bias", (*num_local, config.gemm1.weight_rows), either),
        ("gemm2_bias", "w2_bias", (*num_local, config.gemm2.weight_rows), either),
        ("added", "added", (num_tokens, config.hidden_size), either),
        ("added.gate", "added_gate", (num_tokens,), either),
    ]


define("run_layer", _SCHEMA, run_layer, _fake_layer)
define("run_layer_unfinalized", _SCHEMA, run_layer_unfinalized, _fake_unfinalized)
