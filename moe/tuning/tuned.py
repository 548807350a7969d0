"""TunedPipeline: a layer that runs each bucket of token counts as the tables say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe.call import LayerCall, check_call
from moe.checks import expect_count, is_as_expected
from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.flow import Added, ExpertOutputs, SwigluParams, TopK
from moe.permute.added import as_added
from moe.pipeline import MoEPipeline
from moe.runtime.device import expect_kernels
from moe.traced import add_maker, is_traced, keep, recipe_of, run_traced, run_traced_unfinalized
from moe.tuning.autotune import active, tune_missing
from moe.tuning.buckets import bucket_of
from moe.tuning.choice import names_the_chain
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import TABLES, look_up
from moe.tuning.table import warn
from moe.workspace import Workspace

_REPLACEABLE = frozenset(field.name for field in dataclasses.fields(MoEPipeline) if field.init) - {"config"}


def tuned_config(config: MoEConfig, num_tokens: int, device: torch.device | str | GpuModel) -> MoEConfig:
    """`config` for `num_tokens` tokens, with the tables' choice in the place of what it leaves to the model.

    The same config where no table has the layer and bucket, on a CPU, where the tables' choice does not fit the layer, and
    for a config that names its kernels, as a batch-invariant one.
    """
    if names_the_chain(config):
        return config
    choice = look_up(config, num_tokens, device)
    if choice is None:
        return config
    try:
        return choice.apply(config)
    except ValueError as error:
        warn(f"the tuned choice for {num_tokens} tokens is not used: {' '.join(str(error).split())}")
        return config


class _Kept:
    """Pipelines that were built: of a bucket while the tables stay as they were, of a config for good."""

    def __init__(self) -> None:
        self.of_config: dict[MoEConfig, MoEPipeline] = {}
        self.generation = -1
        self.of_bucket: dict[int | None, MoEPipeline] = {}


@dataclass(frozen=True)
class TunedPipeline:
    """A MoEPipeline for each bucket of token counts; the entries are MoEPipeline's, with its arguments and errors.

    Token counts of different buckets may be summed in another order, as with any other choice of tiles.
    """

    config: MoEConfig  # as it was given: what it names explicitly holds in every bucket
    device: torch.device
    uses_pdl: bool = True
    gpu: GpuModel | None = None  # whose tables are read; None: the device's
    replaced: tuple[tuple[str, Any], ...] = ()  # MoEPipeline's fields that are swapped in every bucket
    max_num_tokens: int = 8192  # up to where `autotune()` tunes
    recipe: str = field(init=False, repr=False, compare=False)  # what an operator knows this pipeline by
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = {"uses_pdl": self.uses_pdl, "max_num_tokens": self.max_num_tokens}
        replaced = dict(self.replaced)
        if replaced or self.gpu is not None:
            recipe = keep(self, is_checked=replaced.get("checks_inputs", True))
        else:
            recipe = recipe_of("tuned", self.config, **numbers)
        object.__setattr__(self, "recipe", recipe)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}  # which is built anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=_Kept())
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
        """As `MoEPipeline.__call__`."""
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
        """As `MoEPipeline.expert_outputs`."""
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
        """As `MoEPipeline.run_experts`."""
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
        """As `MoEPipeline.run_experts_unfinalized`."""
        tensors = (topk, hidden_states, w1, w2, swiglu, None, None, None)
        return self.run_unfinalized(LayerCall(*tensors, True, None, None, w1_bias, w2_bias))

    def run(self, call: LayerCall) -> Tensor:
        """As `MoEPipeline.run`."""
        if is_traced(call.hidden_states):
            return run_traced(self.recipe, call)
        return self._tuned_for(call).run(call)

    def run_unfinalized(self, call: LayerCall) -> ExpertOutputs:
        """As `MoEPipeline.run_unfinalized`."""
        if is_traced(call.hidden_states):
            return run_traced_unfinalized(self.recipe, call)
        return self._tuned_for(call).run_unfinalized(call)

    def workspace_bytes(self, num_tokens: int) -> int:
        """As `MoEPipeline.workspace_bytes`; another number once the bucket of `num_tokens` is tuned."""
        return self.at(num_tokens).workspace_bytes(num_tokens)

    def workspace(self, num_tokens: int) -> Workspace:
        """As `MoEPipeline.workspace`; other numbers once the bucket of `num_tokens` is tuned."""
        return self.at(num_tokens).workspace(num_tokens)

    def at(self, num_tokens: int) -> MoEPipeline:
        """The pipeline that runs `num_tokens` tokens, built when it is first asked for."""
        kept = self._kept
        if kept.generation == TABLES.generation:
            pipeline = kept.of_bucket.get(bucket_of(num_tokens))
            if pipeline is not None:
                return pipeline
        return self._build(num_tokens)

    def replace(self, **stages: Any) -> TunedPipeline:
        """The same with some stages swapped in every bucket, as `dataclasses.replace` swaps them in one.

        Raises:
            TypeError: a name that is no field of MoEPipeline, or its config, which the tables fill in.
        """
        for name in stages:
            if name not in _REPLACEABLE:
                raise TypeError(f"replace: expected one of {', '.join(sorted(_REPLACEABLE))}, got {name!r}")
        return dataclasses.replace(self, replaced=tuple((dict(self.replaced) | stages).items()))

    def _build(self, num_tokens: int) -> MoEPipeline:
        kept, generation = self._kept, TABLES.generation
        if kept.generation != generation:
            # In this order, a thread between the two finds no bucket rather than an old one.
            kept.of_bucket = {}
            kept.generation = generation
        of_bucket = kept.of_bucket
        config = tuned_config(self.config, num_tokens, self.gpu or self.device)
        pipeline = kept.of_config.get(config)
        if pipeline is None:
            pipeline = build_pipeline(config, self.device, uses_pdl=self.uses_pdl)
            if self.replaced:
                pipeline = dataclasses.replace(pipeline, **dict(self.replaced))
            pipeline = kept.of_config.setdefault(config, pipeline)
        of_bucket[bucket_of(num_tokens)] = pipeline
        return pipeline

    def _tuned_for(self, call: LayerCall) -> MoEPipeline:
        """The pipeline of the call's bucket; within `autotune()` tuned first, for a call that is not going to be refused."""
        if active():
            pipeline = self.at(call.num_tokens)
            if pipeline.checks_inputs:
                check_call(pipeline.config, call)
            gemms = zip((call.w1, call.w2), (self.config.gemm1, self.config.gemm2))
            # Swapped stages may take other weights.
            if all(is_as_expected(weights, gemm.weight_shape, torch.bfloat16) for weights, gemm in gemms):
                tune_missing(self.config, call.num_tokens, call.w1, call.w2, max_num_tokens=self.max_num_tokens)
        return self.at(call.num_tokens)


def tuned_pipeline(
    config: MoEConfig,
    device: torch.device | str,
    *,
    uses_pdl: bool = True,
    gpu: GpuModel | None = None,
    max_num_tokens: int = 8192,
) -> TunedPipeline:
    """The layer for a device, run in each bucket of token counts as the tables say: the user's, then the shipped one.

    What no table holds runs as `moe.build_pipeline` has it. On a CPU that is all, and no table is read.

    Args:
        uses_pdl: as `moe.build_pipeline`.
        gpu: whose tables are read; None: the device's.
        max_num_tokens: up to where a first call within `autotune()` tunes.

    Example:
        >>> pipeline = tuned_pipeline(config, "cuda")
        >>> output = pipeline(logits, hidden_states, w1, w2)

    Raises:
        TypeError: a config that is none, a number that is no int.
        ValueError: max_num_tokens below 1, or a GPU or a system that the kernels do not run on.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a MoEConfig, got {type(config).__name__}; MoEConfig.create makes one")
    expect_count("max_num_tokens", max_num_tokens)
    device = torch.device(device)
    if device.type == "cuda":
        expect_kernels(device)
    return TunedPipeline(config, device, uses_pdl, gpu, max_num_tokens=max_num_tokens)


add_maker("tuned", tuned_pipeline)
