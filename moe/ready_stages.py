"""What a pipeline runs: each check of a call once. Stages of our own launch, others have their results checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe.call import LayerCall
from moe.checks import expect, expect_type, is_as_expected
from moe.config import MoEConfig
from moe.flow import Added, Permutation, SwigluParams, TopK, WeighedSlots
from moe.fused.few_tokens.config import FewTokenConfig
from moe.runtime.scratch import without_buffer
from moe.stages import CheckedStage, Finalizer, FusedExperts, Gemm1, Gemm2, Permuter, Router, TokenWeigher


class Composition(Protocol):
    """The fields of a MoEPipeline that say what runs."""

    @property
    def config(self) -> MoEConfig: ...
    @property
    def route(self) -> Router: ...
    @property
    def permute(self) -> Permuter: ...
    @property
    def gemm1(self) -> Gemm1: ...
    @property
    def gemm2(self) -> Gemm2: ...
    @property
    def finalize(self) -> Finalizer: ...
    @property
    def checks_inputs(self) -> bool: ...
    @property
    def fused(self) -> FusedExperts | None: ...
    @property
    def weigh(self) -> TokenWeigher | None: ...


class ReadyStages(NamedTuple):
    """The five stages, and what stands for the last four up to `max_fused_tokens` tokens."""

    route: Router
    permute: Permuter
    gemm1: Gemm1
    gemm2: Gemm2
    finalize: Finalizer
    fused: Callable[..., Tensor]
    max_fused_tokens: int  # -1 where there is none, or it steps aside
    fuses_biases: bool  # whether it takes w1_bias and w2_bias; where not, it steps aside in a call that has one
    without_bias: dict[str, str]  # "gemm1" and "gemm2", where that stage does not take `bias`, and who it is
    weigh: TokenWeigher | None = None  # after route
    fuses_added: bool = False  # whether it takes `added`, as with biases
    without_added: str | None = None  # who finalize is, where it takes no `added`

    def fuses(self, call: LayerCall, num_tokens: int) -> bool:
        """Whether `fused` runs the call."""
        has_biases = call.w1_bias is not None or call.w2_bias is not None
        takes = (self.fuses_biases or not has_biases) and (self.fuses_added or call.added is None)
        return takes and num_tokens <= self.max_fused_tokens

    def expect_more(self, call: LayerCall) -> None:
        """Raise unless the stages take the biases of the call, and what it adds."""
        if call.added is not None and self.without_added is not None:
            raise ValueError(
                f"added: expected None, since the pipeline's finalize takes none, got a value; give {self.without_added} a keyword "
                "`added`, or add it to the result"
            )
        for stage, bias in (("gemm1", call.w1_bias), ("gemm2", call.w2_bias)):
            if bias is not None and stage in self.without_bias:
                raise ValueError(
                    f"{stage}_bias: expected None, since the pipeline's {stage} takes none, got a tensor; give "
                    f"{self.without_bias[stage]} a keyword `bias`, or leave the bias out"
                )


def ready_stages(pipeline: Composition) -> ReadyStages:
    """Our own stages without their checks, since the pipeline checks the call; others with their results checked.

    Behind one that is not ours, ours keep their checks: only they know what their arguments may share memory with. All of them do
    where the pipeline checks nothing. What is not ours takes no scratch from a caller's buffer, whose size does not count it.
    """
    config, checks = pipeline.config, pipeline.checks_inputs
    stages: list[Any] = [pipeline.route, pipeline.permute, pipeline.gemm1, pipeline.gemm2, pipeline.finalize]
    configs: list[Any] = [config.routing, config.planned, config.gemm1, config.gemm2, config.summed]
    wrappers: list[Any] = [checked_router, checked_permuter, checked_gemm1, checked_gemm2, checked_finalizer]
    if config.weighs_input:
        if pipeline.weigh is None:
            raise ValueError(
                'weigh: expected a stage, since weight_on is "input", got None; moe.build_pipeline(config, device).weigh is one'
            )
        for row, entry in zip((stages, configs, wrappers), (pipeline.weigh, config.permute, checked_weigher)):
            row.insert(1, entry)
    may_launch = checks
    ready: list[Any] = []
    for stage, part, checked in zip(stages, configs, wrappers):
        is_ours = isinstance(stage, CheckedStage) and stage.config == part
        may_launch = may_launch and is_ours
        if is_ours:
            ready.append(stage.launch if may_launch else stage)
        else:
            mine = without_buffer(stage)
            ready.append(checked(mine, config) if checks else mine)
    weigh = ready.pop(1) if config.weighs_input else None
    route, permute, gemm1, gemm2, finalize = ready
    gemms: dict[str, Any] = {"gemm1": pipeline.gemm1, "gemm2": pipeline.gemm2}
    without_bias = {name: _name_of(stage) for name, stage in gemms.items() if not _takes(stage, "bias")}
    without_added = None if _takes(pipeline.finalize, "added") else _name_of(pipeline.finalize)
    fused, fuses = pipeline.fused, not (config.weighs_input and config.top_k > 1)  # which needs a row of input a slot
    if fused is None or not fuses or any(mine is not other for mine, other in zip(stages[-4:], fused.stands_for)):
        nothing = (_nothing, -1, False, without_bias, weigh)
        return ReadyStages(route, permute, gemm1, gemm2, finalize, *nothing, without_added=without_added)
    run = _ready_fused(fused.run, config, may_launch=may_launch)
    fuses_biases = _takes(fused.run, "w1_bias") and _takes(fused.run, "w2_bias")
    found = (run, fused.max_tokens, fuses_biases, without_bias, weigh, _takes(fused.run, "added"), without_added)
    return ReadyStages(route, permute, gemm1, gemm2, finalize, *found)


def _takes(stage: Callable[..., Any], keyword: str) -> bool:
    """Whether a stage has a keyword, as far as its signature tells."""
    try:
        parameters = inspect.signature(stage.run if isinstance(stage, CheckedStage) else stage).parameters
    except (TypeError, ValueError):
        return True
    return keyword in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _name_of(stage: Callable[..., Any]) -> str:
    return getattr(stage, "__qualname__", type(stage).__qualname__)


def _ready_fused(run: Callable[..., Tensor], config: MoEConfig, *, may_launch: bool) -> Callable[..., Tensor]:
    if not isinstance(run, CheckedStage):
        return without_buffer(run)
    few = run.config
    if not isinstance(few, FewTokenConfig) or not few.is_of_stages(config.permute, config.gemm1, config.gemm2):
        return without_buffer(run)
    return run.launch if may_launch else run


def _nothing(*args: Any, **more: Any) -> Tensor:
    raise AssertionError("there is no fused callable")


def checked_router(route: Router, config: MoEConfig) -> Router:
    """A router that is none of ours, with its result checked."""

    def run(logits: Tensor, bias: Tensor | None = None, *, replay_out: Tensor | None = None) -> TopK:
        topk = route(logits, bias, replay_out=replay_out)
        config.permute.check(topk)
        if topk.expert_ids.shape[0] != logits.shape[0] or topk.expert_ids.device != logits.device:
            dims = {"T": logits.shape[0], "K": config.top_k}
            expect("expert_ids", topk.expert_ids, "T K", dims, dtype=torch.int32, device=logits.device)
        return topk

    return run


def checked_weigher(weigh: TokenWeigher, config: MoEConfig) -> TokenWeigher:
    """A weigher that is none of ours, with its result checked."""

    def run(hidden_states: Tensor, topk: TopK) -> WeighedSlots:
        weighed = weigh(hidden_states, topk)
        name, device = "result of weigh", hidden_states.device
        expect_type(name, weighed, WeighedSlots, "moe.flow.WeighedSlots(..) makes one")
        config.permute.check(weighed.topk)
        dims = {"T": topk.expert_ids.shape[0], "K": config.top_k}
        expect(f"{name}: expert_ids", weighed.topk.expert_ids, "T K", dims, dtype=torch.int32, device=device)
        dims = {"slots": dims["T"] * dims["K"], "H": config.hidden_size}
        expect(name, weighed.hidden_states, "slots H", dims, dtype=torch.bfloat16, device=device)
        return weighed

    return run


def checked_permuter(permute: Permuter, config: MoEConfig) -> Permuter:
    """A permuter that is none of ours, with its result checked."""

    def run(topk: TopK) -> Permutation:
        permutation = permute(topk)
        _check_permutation(permutation, topk, config)
        return permutation

    return run


def _check_permutation(permutation: Permutation, topk: TopK, config: MoEConfig) -> None:
    name, device = "result of permute", topk.expert_ids.device
    expect_type(name, permutation, Permutation, "moe.Permutation(..) makes one")
    dims = {"T": topk.expert_ids.shape[0], "K": config.planned.top_k}
    shapes = {
        "row_of_slot": "T K",
        "token_of_row": "P",
        "expert_of_tile": "tiles",
        "row_limit_of_tile": "tiles",
        "num_rows": "1",
        "num_tiles": "1",
    }
    for field, shape in shapes.items():
        expect(f"{name}: {field}", getattr(permutation, field), shape, dims, dtype=torch.int32, device=device)
    if dims["P"] != dims["tiles"] * permutation.tile_rows:
        raise ValueError(
            f"{name}: expected token_of_row of tiles * tile_rows = {dims['tiles']} * {permutation.tile_rows} rows, got "
            f"{dims['P']}; make both of one bound"
        )


def checked_gemm1(gemm1: Gemm1, config: MoEConfig) -> Gemm1:
    """A gemm1 that is none of ours, with its result checked."""

    def run(
        hidden_states: Tensor,
        weights: Tensor,
        permutation: Permutation,
        *,
        swiglu: SwigluParams | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if bias is None:
            result = gemm1(hidden_states, weights, permutation, swiglu=swiglu)
        else:
            result = gemm1(hidden_states, weights, permutation, swiglu=swiglu, bias=bias)
        return _checked_rows("gemm1", result, (permutation.max_rows, config.intermediate_size), permutation)

    return run


def checked_gemm2(gemm2: Gemm2, config: MoEConfig) -> Gemm2:
    """A gemm2 that is none of ours, with its result checked."""

    def run(rows: Tensor, weights: Tensor, permutation: Permutation, *, bias: Tensor | None = None) -> Tensor:
        result = gemm2(rows, weights, permutation) if bias is None else gemm2(rows, weights, permutation, bias=bias)
        return _checked_rows("gemm2", result, (permutation.max_rows, config.hidden_size), permutation)

    return run


def checked_finalizer(finalize: Finalizer, config: MoEConfig) -> Finalizer:
    """A finalizer that is none of ours, with its result checked."""

    def run(
        rows: Tensor,
        topk: TopK,
        permutation: Permutation,
        *,
        output: Tensor | None = None,
        added: Added | None = None,
    ) -> Tensor:
        more = {} if added is None else {"added": added}
        result = finalize(rows, topk, permutation, output=output, **more)
        return _checked_rows("finalize", result, (permutation.row_of_slot.shape[0], config.hidden_size), permutation)

    return run


def _checked_rows(stage: str, result: Tensor, shape: tuple[int, int], permutation: Permutation) -> Tensor:
    device = permutation.row_of_slot.device
    if not is_as_expected(result, shape, torch.bfloat16, device):
        expect(f"result of {stage}", result, f"{shape[0]} {shape[1]}", {}, dtype=torch.bfloat16, device=device)
    return result
