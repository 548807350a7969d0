"""The layer: five callables in a row. This file is the architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moe import failing_calls
from moe.call import LayerCall, check_call
from moe.config import MoEConfig
from moe.flow import Added, ExpertOutputs, Permutation, SwigluParams, TopK
from moe.gemm.numbers import numbers_by_expert
from moe.permute.added import as_added
from moe.ready_stages import ReadyStages, ready_stages
from moe.runtime.scratch import scratch_from
from moe.stages import Finalizer, FusedExperts, Gemm1, Gemm2, Permuter, Router, TokenWeigher
from moe.traced import is_kept, is_traced, keep, run_traced, run_traced_unfinalized
from moe.workspace import Workspace, workspace_of


@dataclass(frozen=True)
class MoEPipeline:
    """A bf16 MoE layer: route -> permute -> gemm1 -> gemm2 -> finalize.

    Enter with logits (`pipeline(...)`, `expert_outputs`) or with chosen experts (`run_experts`,
    `run_experts_unfinalized`); leave with tokens, or before finalize with rows, weights and map.
    Any stage is swapped with `dataclasses.replace(pipeline, gemm1=mine)`. For few tokens `fused` may stand for stages 2 to 5.

    Every entry checks all of its tensors once, before the first stage runs, and raises TypeError (not a tensor) or ValueError
    (naming the tensor, what was wanted, what came and the cure). So it does with what a swapped stage returns. Stages that take
    other tensors than `config` says go with `replace(pipeline, checks_inputs=False, ...)`, and check for themselves.

    Shapes: logits [T, E] float32 or bfloat16, bias [E] bfloat16 or float32, hidden_states [T, H] bfloat16,
    w1 and w2 bfloat16 in `config.gemm1.weight_shape` and `config.gemm2.weight_shape`, w1_bias [E_local, rows of W1] and w2_bias
    [E_local, H] bfloat16 or float32, in the order in which the weights have their rows.
    Forward only: no gradient is recorded.
    """

    config: MoEConfig
    route: Router
    permute: Permuter
    gemm1: Gemm1
    gemm2: Gemm2
    finalize: Finalizer
    checks_inputs: bool = True
    fused: FusedExperts | None = None
    # After route, where `config.weight_on` is "input"; `permute` is then given slots as tokens with one choice each.
    weigh: TokenWeigher | None = None
    recipe: str = field(init=False, repr=False, compare=False)  # what an operator knows this pipeline by

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", keep(self, is_checked=self.checks_inputs))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ready"}  # which is made anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if is_kept(self.recipe):
            self.__post_init__()

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
        workspace: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """logits and hidden_states -> [T, H] bfloat16, in `output` where given.

        Args:
            swiglu: per-expert parameters of the activation.
            output: [T, H] bfloat16 memory of its own to write.
            routing_replay_out: [>=T, K] int16; rows [0, T) receive the chosen global ids.
            workspace: [bytes] uint8 memory of its own, at least `workspace(T).asked_bytes` of it, that our kernels take
                their scratch from; calls that share one must follow one another on a stream. None: torch's allocator.
            added: [T, H] bfloat16 or float32 that is summed with each token's weighted rows before they are rounded, such as a
                shared expert's result; with a gate as `moe.Added`. Not the memory of `output`.
            w1_bias, w2_bias: added to the products with W1 and W2, in float32, before the activation and before the rounding.
        """
        tensors = (logits, hidden_states, w1, w2, swiglu, bias, output, routing_replay_out)
        return self.run(LayerCall(*tensors, False, workspace, as_added(added), w1_bias, w2_bias))

    def expert_outputs(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        routing_replay_out: Tensor | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> ExpertOutputs:
        """The same, stopped before finalize."""
        tensors = (logits, hidden_states, w1, w2, swiglu, bias, None, routing_replay_out)
        return self.run_unfinalized(LayerCall(*tensors, False, None, None, w1_bias, w2_bias))

    def run_experts(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        workspace: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """The same from chosen experts. Ids that are not local, or no expert's, are skipped."""
        tensors = (topk, hidden_states, w1, w2, swiglu, None, output, None)
        return self.run(LayerCall(*tensors, True, workspace, as_added(added), w1_bias, w2_bias))

    def run_experts_unfinalized(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> ExpertOutputs:
        """The same from chosen experts, stopped before finalize."""
        tensors = (topk, hidden_states, w1, w2, swiglu, None, None, None)
        return self.run_unfinalized(LayerCall(*tensors, True, None, None, w1_bias, w2_bias))

    def run(self, call: LayerCall) -> Tensor:
        """One call of the layer, to [T, H] bfloat16."""
        if is_traced(call.hidden_states):
            return run_traced(self.recipe, call)
        if failing_calls.FOLDER is not None:
            return failing_calls.watched(self.config, call, self._stage_names, self._run, is_finalized=True)
        return self._run(call)

    def _run(self, call: LayerCall) -> Tensor:
        call = self._with_numbers(call)
        self._check(call)
        if call.workspace is None:
            return self._chain(call)
        with scratch_from(call.workspace):
            return self._chain(call)

    def _with_numbers(self, call: LayerCall) -> LayerCall:
        """The call with the activation's numbers of the config, where there are any and it brings none."""
        numbers = self.config.swiglu
        if numbers is None or call.swiglu is not None or not isinstance(call.hidden_states, Tensor):
            return call
        swiglu = numbers_by_expert(
            numbers.alpha,
            numbers.beta,
            numbers.clamp_limit,
            self.config.gemm1.num_experts,
            call.hidden_states.device,
        )
        return call._replace(swiglu=swiglu)

    def _check(self, call: LayerCall) -> None:
        if self.checks_inputs:
            check_call(self.config, call)
        if call.w1_bias is not None or call.w2_bias is not None or call.added is not None:
            self.ready.expect_more(call)

    def _chain(self, call: LayerCall) -> Tensor:
        stages = self.ready
        topk, hidden_states = self._routed(call)
        # Only where it is given: what a caller swapped in may not know it.
        more: dict[str, Any] = {} if call.added is None else {"added": call.added}
        biases = (
            {} if call.w1_bias is None and call.w2_bias is None else {"w1_bias": call.w1_bias, "w2_bias": call.w2_bias}
        )
        if stages.fuses(call, topk.expert_ids.shape[0]):
            experts = (topk, hidden_states, call.w1, call.w2)
            return stages.fused(*experts, swiglu=call.swiglu, output=call.output, **more, **biases)
        rows, permutation = self._rows(topk, hidden_states, call)
        return stages.finalize(rows, topk, permutation, output=call.output, **more)

    def run_unfinalized(self, call: LayerCall) -> ExpertOutputs:
        """One call of the layer, stopped before finalize."""
        if is_traced(call.hidden_states):
            return run_traced_unfinalized(self.recipe, call)
        if failing_calls.FOLDER is not None:
            return failing_calls.watched(
                self.config, call, self._stage_names, self._run_unfinalized, is_finalized=False
            )
        return self._run_unfinalized(call)

    def _run_unfinalized(self, call: LayerCall) -> ExpertOutputs:
        if call.added is not None:
            raise ValueError("added: expected None before finalize, got a value; add it where the rows are summed")
        call = self._with_numbers(call)
        self._check(call)
        topk, hidden_states = self._routed(call)
        rows, permutation = self._rows(topk, hidden_states, call)
        return ExpertOutputs(rows, topk.weights, permutation.row_of_slot)

    def _routed(self, call: LayerCall) -> tuple[TopK, Tensor]:
        """The choice, and what experts are given: tokens, or where their input is weighed slots, which then weigh 1."""
        stages = self.ready
        topk = call.entry if call.is_chosen else stages.route(call.entry, call.bias, replay_out=call.routing_replay_out)
        if stages.weigh is None:
            return topk, call.hidden_states
        weighed = stages.weigh(call.hidden_states, topk)
        return weighed.topk, weighed.hidden_states

    def _rows(self, topk: TopK, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Permutation]:
        stages = self.ready
        permutation = stages.permute(topk if stages.weigh is None else topk.slot_by_slot)
        first = {} if call.w1_bias is None else {"bias": call.w1_bias}
        second = {} if call.w2_bias is None else {"bias": call.w2_bias}
        activation = stages.gemm1(hidden_states, call.w1, permutation, swiglu=call.swiglu, **first)
        rows = stages.gemm2(activation, call.w2, permutation, **second)
        if stages.weigh is not None:
            permutation = replace(permutation, row_of_slot=permutation.row_of_slot.view(topk.expert_ids.shape))
        return rows, permutation

    def workspace_bytes(self, num_tokens: int) -> int:
        """Upper bound in bytes on what a call over `num_tokens` tokens allocates beside its [T, H] output, as torch counts.

        Raises:
            ValueError: a negative number, or more tokens than rows can be numbered for.
        """
        return self.workspace(num_tokens).counted_bytes

    def workspace(self, num_tokens: int) -> Workspace:
        """The same, beside the bytes that are asked for; errors alike."""
        return workspace_of(self.config, num_tokens)

    @property
    def _stage_names(self) -> dict[str, str]:
        names = ("route", *(("weigh",) if self.config.weighs_input else ()), "permute", "gemm1", "gemm2", "finalize")
        return {name: repr(getattr(self, name)).partition(" at 0x")[0] for name in names}

    @functools.cached_property
    def ready(self) -> ReadyStages:
        """What a call runs, once its tensors were checked."""
        return ready_stages(self)
