"""The flat calls that engines know: flashinfer's `trtllm_bf16_moe` and `trtllm_bf16_routed_moe`, argument for argument.

Source of names, order, defaults and meaning: flashinfer's documentation page of `flashinfer.fused_moe.trtllm_bf16_moe`.
"""

from __future__ import annotations

import operator
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from moe.base_config import plain_error
from moe.call import LayerCall
from moe.checks import as_float, as_int, expect, plain_number
from moe.config import NAMES_OF_FIELDS, MoEConfig, stage_fields
from moe.flow import ExpertOutputs, SwigluParams, TopK
from moe.gemm.config import BLOCK_MAJOR_K, ActivationType, WeightFormat, WeightLayout
from moe.traced import is_traced, run_traced, run_traced_unfinalized
from moe.tuning.tuned import TunedPipeline, tuned_pipeline
from moe.workspace import workspace_of_any_choice


def trtllm_bf16_moe(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None = None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = True,
    weight_layout: int = WeightLayout.BlockMajorK,
    do_finalize: bool = True,
    enable_pdl: bool | None = True,
    tune_max_num_tokens: int = 8192,
    activation_type: int = ActivationType.Swiglu,
    norm_topk_prob: bool = True,
    routing_replay_out: Tensor | None = None,
    gemm1_alpha: Tensor | None = None,
    gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None,
    output: Tensor | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    is_batch_invariant: bool = False,
) -> Tensor | list[Tensor]:
    """Route tokens by their logits and run the local experts, in bf16.

    Args:
        routing_logits: [T, E] float32 or bfloat16.
        routing_bias: [E] bfloat16 or float32, or None for zeros; methods 2 and 7 use it, to choose experts only.
        hidden_states: [T, H] bfloat16.
        gemm1_weights: [E_local, H/64, 2I, 64] bfloat16 ([E_local, H/64, I, 64] for Relu2), rows [up; gate], shuffled.
        gemm2_weights: [E_local, I/64, H, 64] bfloat16, shuffled.
        num_experts: E, over all ranks.
        top_k: K.
        n_group: DeepSeekV3: number of expert groups; None, 0 or 1 for none.
        topk_group: DeepSeekV3: groups a token may use.
        intermediate_size: I, a multiple of 64 (the original: of 128).
        local_expert_offset: first expert whose weights are given.
        local_num_experts: E_local, how many. Other experts add nothing: sum the ranks' results.
        routed_scaling_factor: methods 2 and 7; None means 1.
        routing_method_type: a RoutingMethodType, 0 to 8.
        use_shuffled_weight: False takes the same blocks with rows in their natural order, [up; gate] not interleaved
            (the original has no kernel for it).
        weight_layout: BlockMajorK (2), the only one of this call; `moe.build_pipeline` takes the others.
        do_finalize: False returns the experts' rows before they are weighted and summed.
        enable_pdl: let kernels start before the one before them has ended (compute capability 9.0 and up).
            None means True. The result is the same.
        tune_max_num_tokens: within `moe.tuning.autotune()`, the first call tunes all token counts up to this one that no
            table holds. Elsewhere nothing is timed: tiles come from the tables, else from a model of the shape.
        activation_type: one of `moe.ActivationType`, by its number.
        norm_topk_prob: method 6 only: divide the weights by their sum.
        routing_replay_out: [>=T, K] int16; rows [0, T) receive the chosen global ids, other rows are left alone.
        gemm1_alpha, gemm1_beta, gemm1_clamp_limit: [E_local] float32, see `moe.SwigluParams`.
        output: [T, H] bfloat16 to write and return; ignored with do_finalize=False.
        workspace_buffer: [bytes] uint8 that our kernels take their scratch from, as large as `trtllm_fused_moe_workspace_size`
            says; None: torch's allocator. Calls that share one must follow one another on a stream. Not with
            do_finalize=False, whose results would lie in it.
        is_batch_invariant: on a GPU, give a token the bits that it has in any batch, at a cost; see `moe.MoEConfig.create`.

    Returns:
        [T, H] bfloat16; with do_finalize=False the list
        [gemm2_output [P, H] bfloat16, expert_weights [T, K] bfloat16, expanded_idx_to_permuted_idx [T * K] int32], where
        the map holds a row of gemm2_output, or -1 for an expert that is not local. Rows that it does not name are
        uninitialised.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: anything else that does not fit, before anything is launched or written.
    """
    layer = FlatLayer(
        _hidden_size(hidden_states), hidden_states.device, num_experts, top_k, n_group, topk_group,
        intermediate_size, local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type,
        use_shuffled_weight, weight_layout, do_finalize, enable_pdl, tune_max_num_tokens, activation_type,
        norm_topk_prob, is_batch_invariant,
    )  # fmt: skip
    swiglu = _swiglu(gemm1_alpha, gemm1_beta, gemm1_clamp_limit)
    if not do_finalize:
        _refuse_workspace(workspace_buffer)
    call = LayerCall(
        routing_logits, hidden_states, gemm1_weights, gemm2_weights, swiglu, routing_bias,
        output if do_finalize else None, routing_replay_out, False, workspace_buffer,
    )  # fmt: skip
    if is_traced(hidden_states):
        return _traced(layer, call)
    pipeline = _pipeline(layer)
    if do_finalize:
        return pipeline.run(call)
    return _as_list(pipeline.run_unfinalized(call))


def trtllm_bf16_routed_moe(
    topk_ids: Tensor | tuple[Tensor, Tensor],
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None = None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = True,
    weight_layout: int = WeightLayout.BlockMajorK,
    do_finalize: bool = True,
    enable_pdl: bool | None = True,
    gemm1_lora_delta: None = None,
    tune_max_num_tokens: int = 8192,
    activation_type: int = ActivationType.Swiglu,
    routing_replay_out: Tensor | None = None,
    gemm1_alpha: Tensor | None = None,
    gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None,
    output: Tensor | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    is_batch_invariant: bool = False,
) -> Tensor | list[Tensor]:
    """Run the local experts that the caller chose. Arguments that are not named here are as in `trtllm_bf16_moe`.

    Args:
        topk_ids: [T, K] int32, each `expert_id << 16 | bits of the bfloat16 weight`; or a tuple of ids [T, K] int32 and
            weights [T, K] bfloat16 or float32, which are used as they are. An id outside [0, E) is skipped; one that
            occurs twice in a row counts twice.
        routing_method_type, routed_scaling_factor, n_group, topk_group: must fit together as in `trtllm_bf16_moe`, and
            have no other effect: the experts are chosen already.
        gemm1_lora_delta: refused.
        routing_replay_out: checked, and not written: the ids are the caller's own.

    Returns:
        As `trtllm_bf16_moe`; with do_finalize=False and a tuple, expert_weights is the caller's own tensor.
    """
    if gemm1_lora_delta is not None:
        raise ValueError(
            "gemm1_lora_delta: expected None, got a value; it is not supported: swap the gemm1 stage of a pipeline "
            "(moe.build_pipeline) to add to its result before the activation"
        )
    layer = FlatLayer(
        _hidden_size(hidden_states), hidden_states.device, num_experts, top_k, n_group, topk_group,
        intermediate_size, local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type,
        use_shuffled_weight, weight_layout, do_finalize, enable_pdl, tune_max_num_tokens, activation_type, True,
        is_batch_invariant,
    )  # fmt: skip
    swiglu = _swiglu(gemm1_alpha, gemm1_beta, gemm1_clamp_limit)
    if not do_finalize:
        _refuse_workspace(workspace_buffer)
    if is_traced(hidden_states):
        topk = _unpacked(topk_ids) if isinstance(topk_ids, Tensor) else TopK(*topk_ids)
        call = LayerCall(topk, hidden_states, gemm1_weights, gemm2_weights, swiglu, output=output, is_chosen=True)
        return _traced(layer, call)
    pipeline = _pipeline(layer)
    topk = _unpack(topk_ids, top_k)
    if routing_replay_out is not None:
        pipeline.config.permute.check(topk)
        pipeline.config.routing.check_replay(routing_replay_out, topk.expert_ids.shape[0], hidden_states.device)
    call = LayerCall(
        topk,
        hidden_states,
        gemm1_weights,
        gemm2_weights,
        swiglu,
        output=output if do_finalize else None,
        is_chosen=True,
        workspace=workspace_buffer,
    )
    if do_finalize:
        return pipeline.run(call)
    return _as_list(pipeline.run_unfinalized(call))


def trtllm_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    quant_mode: str = "bf16",
    local_num_experts: int | None = None,
    activation_type: int = ActivationType.Swiglu,
) -> int:
    """Bytes of a `workspace_buffer` that holds the scratch of both flat calls, for up to `max_num_tokens` tokens.

    Whatever tables choose now or later. flashinfer's function of this name also takes what our size does not depend on.

    Raises:
        TypeError: a number that is none.
        ValueError: numbers of no layer, or another quant_mode than "bf16".
    """
    if quant_mode != "bf16":
        raise ValueError(f'quant_mode: expected "bf16", the only one here, got {quant_mode!r}')
    config = MoEConfig.create(
        hidden_size=as_int("hidden_size", hidden_size),
        intermediate_size=as_int("intermediate_size", intermediate_size),
        num_experts=as_int("num_experts", num_experts),
        top_k=as_int("top_k", top_k),
        num_local_experts=None if local_num_experts is None else as_int("local_num_experts", local_num_experts),
        activation=as_int("activation_type", activation_type),
    )
    return workspace_of_any_choice(config, as_int("max_num_tokens", max_num_tokens)).asked_bytes


class FlatLayer(NamedTuple):
    """What a flat call says of its layer beside tensors, by the names and in the order of its arguments."""

    hidden_size: int
    device: torch.device
    num_experts: int
    top_k: int
    n_group: int | None
    topk_group: int | None
    intermediate_size: int
    local_expert_offset: int
    local_num_experts: int
    routed_scaling_factor: float | None
    routing_method_type: int
    use_shuffled_weight: bool
    weight_layout: int
    do_finalize: bool
    enable_pdl: bool | None
    tune_max_num_tokens: int
    activation_type: int
    norm_topk_prob: bool
    is_batch_invariant: bool


def _pipeline(layer: FlatLayer) -> TunedPipeline:
    """The pipeline of a flat call."""
    try:
        return _pipeline_of(*layer)
    except (
        _TensorNumber,
        TypeError,
    ):  # TypeError: a wrong type, or one that nothing is kept for: numpy's arrays have no hash
        plain = FlatLayer(*map(plain_number, layer))
    _checked(plain)  # says which is no number
    return _pipeline_of(*plain)


class _TensorNumber(Exception):
    """Engines pass numbers as tensors too. Those hash by where they lie, so nothing is kept for them."""


# typed: True and 1.0 equal 1, and would find its entry.
@lru_cache(maxsize=1024, typed=True)
def _pipeline_of(*values: Any) -> TunedPipeline:
    """Every check that needs no tensor, once a combination of arguments."""
    if any(isinstance(value, Tensor) for value in values):
        raise _TensorNumber
    layer = _checked(FlatLayer(*values))
    try:
        config = MoEConfig.model_validate(
            stage_fields(
                hidden_size=layer.hidden_size,
                intermediate_size=layer.intermediate_size,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                method=layer.routing_method_type,
                n_group=layer.n_group or 0,
                topk_group=layer.topk_group or 0,
                routed_scaling_factor=1.0 if layer.routed_scaling_factor is None else layer.routed_scaling_factor,
                norm_topk_prob=layer.norm_topk_prob,
                activation=layer.activation_type,
                weight_format=WeightFormat(
                    layout=WeightLayout.BlockMajorK, is_shuffled=layer.use_shuffled_weight, gate_up_order="up_gate"
                ),
                local_expert_offset=layer.local_expert_offset,
                num_local_experts=layer.local_num_experts,
                is_batch_invariant=layer.is_batch_invariant,
            )
        )
    except ValidationError as error:
        raise plain_error(error, _FLAT_NAMES) from None
    uses_pdl = layer.enable_pdl is not False
    return tuned_pipeline(config, layer.device, uses_pdl=uses_pdl, max_num_tokens=layer.tune_max_num_tokens)


_INTS = (
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routing_method_type",
    "weight_layout",
    "tune_max_num_tokens",
    "activation_type",
)
_BOOLS = ("use_shuffled_weight", "do_finalize", "enable_pdl", "norm_topk_prob", "is_batch_invariant")
_MAY_BE_NONE = ("n_group", "topk_group", "enable_pdl", "routed_scaling_factor")


def _checked(layer: FlatLayer) -> FlatLayer:
    """The same with plain numbers. Raise where a type is wrong, or a number that only this call refuses."""
    given = {name: value for name, value in layer._asdict().items() if value is not None or name not in _MAY_BE_NONE}
    plain: dict[str, Any] = {name: as_int(name, given[name]) for name in _INTS if name in given}
    for name in _BOOLS:
        if name in given and not isinstance(given[name], bool):
            raise TypeError(f"{name}: expected a bool, got {type(given[name]).__name__}; pass a bool")
    if "routed_scaling_factor" in given:
        plain["routed_scaling_factor"] = as_float(
            "routed_scaling_factor", given["routed_scaling_factor"], "a float or None"
        )
    layer = layer._replace(**plain)
    if layer.weight_layout != WeightLayout.BlockMajorK:
        raise ValueError(
            f"BF16 Moe: weight_layout must be BlockMajorK: expected 2, got {layer.weight_layout}; convert the weights with "
            "moe.gemm.weight_format, or use moe.build_pipeline, which reads MajorK and MajorMn too"
        )
    if layer.tune_max_num_tokens < 1:
        raise ValueError(
            f"tune_max_num_tokens: expected at least 1, got {layer.tune_max_num_tokens}; the default is 8192"
        )
    if layer.intermediate_size % BLOCK_MAJOR_K:
        raise ValueError(
            f"the second dimension of weights must be a multiple of 128. (Here {BLOCK_MAJOR_K} is enough, the width of a "
            f"block): got intermediate_size={layer.intermediate_size}; pad I, or use moe.build_pipeline with MajorK weights"
        )
    return layer


_LOCAL = ("local_num_experts", "local_num_experts must be between 1 and num_experts: ")
_FLAT_NAMES = {
    **NAMES_OF_FIELDS,
    ("routing", "method"): ("routing_method_type", ""),
    ("permute", "num_local_experts"): _LOCAL,
    ("gemm1", "num_experts"): _LOCAL,
    ("gemm2", "num_experts"): _LOCAL,
}


def _refuse_workspace(workspace_buffer: Tensor | None) -> None:
    if workspace_buffer is not None:
        raise ValueError(
            "workspace_buffer: expected None with do_finalize=False, got a tensor; the rows that are returned would lie in it: "
            "leave it out"
        )


def _hidden_size(hidden_states: Tensor) -> int:
    """H. The pipeline checks the rest; what has no H is refused here."""
    shape: tuple[int, ...] = getattr(hidden_states, "shape", ())
    if len(shape) != 2 or hidden_states.dtype is not torch.bfloat16 or not hidden_states.is_contiguous():
        words = {"dtype": "BF16 MoE: hidden_states must be bfloat16."}
        expect("hidden_states", hidden_states, "T H", {}, dtype=torch.bfloat16, words=words)
    return shape[1]


def _swiglu(alpha: Tensor | None, beta: Tensor | None, clamp_limit: Tensor | None) -> SwigluParams | None:
    if alpha is None and beta is None and clamp_limit is None:
        return None
    return SwigluParams(alpha, beta, clamp_limit)


def _unpack(topk_ids: Tensor | tuple[Tensor, Tensor], top_k: int) -> TopK:
    """Packed ids, or a tuple of ids and weights, as a TopK."""
    if isinstance(topk_ids, (tuple, list)):
        if len(topk_ids) != 2:
            raise ValueError(f"topk_ids: expected (ids, weights), got {len(topk_ids)} items; pass two tensors")
        return TopK(*topk_ids)
    words = {
        "rank": "expert_indices must be 2D.",
        "K": "expert_indices dim1 must match top_k.",
        "dtype": "expert_indices must be int32.",
    }
    expect("topk_ids", topk_ids, "T K", {"K": top_k}, dtype=torch.int32, words=words)
    return _unpacked(topk_ids)


def _unpacked(topk_ids: Tensor) -> TopK:
    halves = topk_ids.view(torch.int16).view(*topk_ids.shape, 2)  # little-endian: weight, then id
    weights = halves[..., 0].contiguous().view(torch.bfloat16)
    return TopK(halves[..., 1].to(torch.int32), weights)


def _traced(layer: FlatLayer, call: LayerCall) -> Tensor | list[Tensor]:
    """The call as an operator, where only the form of its result is asked for, or a program is recorded."""
    recipe = _recorded_recipe(layer) if torch.compiler.is_dynamo_compiling() else _pipeline(layer).recipe
    return run_traced(recipe, call) if layer.do_finalize else _as_list(run_traced_unfinalized(recipe, call))


def _recorded_recipe(layer: FlatLayer) -> str:
    """The recipe of a layer as dynamo records it, which follows none of the checks."""
    for name, value in layer._asdict().items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a plain number under torch.compile, got a tensor; pass an int or a float"
            )
    said = _recipe_or_refusal(*map(_as_constant, layer))
    kind, _, words = said.partition(": ")
    if kind == "TypeError":
        raise TypeError(words)
    if kind == "ValueError":
        raise ValueError(words)
    return said


def _as_constant(value: Any) -> Any:
    """A number as one that the graph is guarded by, where dynamo would make a symbol of one that has changed; a float as its digits."""
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, Enum):
        return operator.index(value.value)
    if isinstance(value, int):
        return operator.index(value)
    return (value.hex(),) if isinstance(value, float) else value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recipe_or_refusal(*constants: Any) -> str:
    """The recipe, or the error's name and words: dynamo lets no error pass as it is."""
    plain: Any = [float.fromhex(value[0]) if isinstance(value, tuple) else value for value in constants]
    try:
        return _pipeline(FlatLayer(*plain)).recipe
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _as_list(outputs: ExpertOutputs) -> list[Tensor]:
    return [outputs.rows, outputs.weights, outputs.row_of_slot.view(-1)]
