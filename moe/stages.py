"""What a stage must look like. Any callable that fits can stand in a pipeline: no base class, no registry."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe.flow import Permutation, SwigluParams, TopK


class Router(Protocol):
    """Stage 1: logits -> each token's K experts and their weights."""

    def __call__(self, logits: Tensor, bias: Tensor | None = None, *, replay_out: Tensor | None = None) -> TopK:
        """logits [T, E], bias [E] or None; writes ids to replay_out[:T] [>=T, K] int16 where given."""
        ...


class Permuter(Protocol):
    """Stage 2: expert ids -> where each slot's row lies."""

    def __call__(self, topk: TopK) -> Permutation: ...


class Gemm1(Protocol):
    """Stage 3: gather each row's token, multiply by its expert's W1, apply the activation."""

    def __call__(
        self, hidden_states: Tensor, weights: Tensor, permutation: Permutation, *, swiglu: SwigluParams | None = None
    ) -> Tensor:
        """hidden_states [T, H] bf16 -> [P, I] bf16; padding rows are undefined."""
        ...


class Gemm2(Protocol):
    """Stage 4: multiply each row by its expert's W2."""

    def __call__(self, rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        """rows [P, I] bf16 -> [P, H] bf16; padding rows are undefined."""
        ...


class Finalizer(Protocol):
    """Stage 5: weighted sum of each token's K rows."""

    def __call__(self, rows: Tensor, topk: TopK, permutation: Permutation, *, output: Tensor | None = None) -> Tensor:
        """rows [P, H] bf16 -> [T, H] bf16, into `output` where given."""
        ...
