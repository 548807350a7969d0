"""What a stage must look like. Any callable that fits can stand in a pipeline: no base class, no registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.base_config import FrozenConfig
from moe.flow import Added, Permutation, SwigluParams, TopK, UnitSize, WeighedSlots


class Router(Protocol):
    """Stage 1: logits -> each token's K experts and their weights."""

    def __call__(self, logits: Tensor, bias: Tensor | None = None, *, replay_out: Tensor | None = None) -> TopK:
        """logits [T, E], bias [E] or None; writes ids to replay_out[:T] [>=T, K] int16 where given."""
        ...


class TokenWeigher(Protocol):
    """Before stage 2, where weights go into the input of experts: each slot's token times its weight."""

    def __call__(self, hidden_states: Tensor, topk: TopK) -> WeighedSlots:
        """hidden_states [T, H] bf16 -> [T * K, H] bf16, and a TopK of the same ids with ones for weights."""
        ...


class Permuter(Protocol):
    """Stage 2: expert ids -> where each slot's row lies."""

    def __call__(self, topk: TopK) -> Permutation: ...


class Gemm1(Protocol):
    """Stage 3: gather each row's token, multiply by its expert's W1, add its bias, apply the activation.

    `bias` is passed where a call has one: a stage for layers without need not take it.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        weights: Tensor,
        permutation: Permutation,
        *,
        swiglu: SwigluParams | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [T, H] bf16, bias [E_local, rows of W1] bf16 or float32 -> [P, I] bf16; padding rows are undefined."""
        ...


class Gemm2(Protocol):
    """Stage 4: multiply each row by its expert's W2, add its bias, which is passed where a call has one."""

    def __call__(
        self, rows: Tensor, weights: Tensor, permutation: Permutation, *, bias: Tensor | None = None
    ) -> Tensor:
        """rows [P, I] bf16, bias [E_local, H] bf16 or float32 -> [P, H] bf16; padding rows are undefined."""
        ...


class Finalizer(Protocol):
    """Stage 5: weighted sum of each token's K rows."""

    def __call__(
        self,
        rows: Tensor,
        topk: TopK,
        permutation: Permutation,
        *,
        output: Tensor | None = None,
        added: Added | None = None,
    ) -> Tensor:
        """rows [P, H] bf16 -> [T, H] bf16, into `output` where given.

        A layer passes `added` where its caller does: a finalizer that never meets it may leave it out.
        """
        ...


class UnitSizeOf(Protocol):
    """Which RowUnits the GEMMs of a layer take under a load, if any: a planner may make them on its way."""

    def __call__(self, device: torch.device, tile_rows: int, mean_rows: int, /) -> UnitSize | None: ...


@dataclass(frozen=True)
class StageKernel:
    """One way to run a stage: a line of the table in the stage's `kernels.py`, of which the first that takes a config runs."""

    name: str
    takes: Callable[[Any], bool]  # whether it takes a config of the stage
    checked: Callable[..., Any]  # the stage function
    launch: Callable[..., Any]  # the same without its checks; the same function where it is nothing without them
    options: tuple[str, ...] = ()  # which of a pipeline's choices, such as uses_pdl, both take

    def bound_to(self, config: Any, **choices: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The stage with its checks and without, for a config and those of the choices that it takes."""
        keywords = {"config": config} | {name: choices[name] for name in self.options}
        checked = partial(self.checked, **keywords)
        return checked, checked if self.launch is self.checked else partial(self.launch, **keywords)


def takes_all(config: Any) -> bool:
    """The `takes` of a kernel that takes every config of its stage."""
    return True


def first_to_take(kernels: Iterable[StageKernel], config: Any) -> StageKernel:
    return next(kernel for kernel in kernels if kernel.takes(config))


@dataclass(frozen=True)
class CheckedStage:
    """A stage in two forms: one that checks its tensors, and one for tensors that were checked.

    Called, it checks. A pipeline that has checked the whole call takes `launch`, if it is a pipeline of this `config`.
    """

    run: Callable[..., Any]
    launch: Callable[..., Any]
    config: FrozenConfig  # the part of the layer's config that `run` checks by

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.run(*args, **more)


@dataclass(frozen=True)
class FusedExperts:
    """One callable that does the work of stages 2 to 5 for few tokens, and the stages that it stands for.

    It steps aside when any of those stages is swapped, where the caller stops before finalize, and in a call with biases unless
    it takes `w1_bias` and `w2_bias`.
    """

    # (topk, hidden_states, w1, w2, *, swiglu, output) -> [T, H] bfloat16, and added= where a caller passes it; may be a CheckedStage
    run: Callable[..., Tensor]
    max_tokens: int
    stands_for: tuple[Permuter, Gemm1, Gemm2, Finalizer]
