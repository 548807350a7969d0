"""What a backward stage must look like. Any callable that fits can stand in a training pipeline."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe.flow import Gemm2Gradients, KeptGemm1, Permutation, SwigluParams, TopK
from moe.gemm.config import GemmConfig


class Gemm1Keeping(Protocol):
    """gemm1, and the product before its activation: for calls that go backward."""

    def __call__(
        self, hidden_states: Tensor, weights: Tensor, permutation: Permutation, *, swiglu: SwigluParams | None = None
    ) -> KeptGemm1:
        """hidden_states [T, H] bf16 -> activation [P, I] and gate_up [P, 2I] bf16; padding rows are undefined."""
        ...


class Gemm2Dgrad(Protocol):
    """Gradients through gemm2, the routing weight and the activation."""

    def __call__(
        self,
        grad_output: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        topk: TopK,
        permutation: Permutation,
        *,
        swiglu: SwigluParams | None = None,
    ) -> Gemm2Gradients:
        """grad_output [T, H] bf16, gate_up [P, 2I] bf16 -> grad_gate_up, weighted_activation (padding rows 0), grad_weights."""
        ...


class Gemm1Dgrad(Protocol):
    """What each row adds to the gradient of its token."""

    def __call__(self, grad_gate_up: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        """grad_gate_up [P, 2I] bf16 -> [P, H] bf16; padding rows are undefined."""
        ...


class Gemm1Wgrad(Protocol):
    """The gradient of W1."""

    def __call__(
        self, grad_gate_up: Tensor, hidden_states: Tensor, permutation: Permutation, *, out: Tensor | None = None
    ) -> Tensor:
        """grad_gate_up [P, 2I], hidden_states [T, H] -> W1's shape in bf16, or added to `out` in float32."""
        ...


class Gemm2Wgrad(Protocol):
    """The gradient of W2."""

    def __call__(
        self, grad_output: Tensor, weighted_activation: Tensor, permutation: Permutation, *, out: Tensor | None = None
    ) -> Tensor:
        """grad_output [T, H], weighted_activation [P, I] -> W2's shape in bf16, or added to `out` in float32."""
        ...


class SwigluGradients(Protocol):
    """The gradients of SwiGLU's parameters."""

    def __call__(
        self,
        grad_output: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        topk: TopK,
        permutation: Permutation,
        *,
        swiglu: SwigluParams,
    ) -> SwigluParams:
        """Arguments as Gemm2Dgrad -> [E_local] float32 for each parameter that is there."""
        ...


class RouteBackward(Protocol):
    """The gradient of the routing weights, passed to the logits that they were made of. Chosen ids are constants."""

    def __call__(self, grad_weights: Tensor, logits: Tensor, expert_ids: Tensor) -> Tensor:
        """grad_weights [T, K] float32, logits [T, E], expert_ids [T, K] int32 -> [T, E] in the logits' dtype."""
        ...


class KeepsBits(Protocol):
    """Whether gemm1_keeping gives the bits of the forward pipeline's gemm1, and may run in its place."""

    def __call__(self, gemm1: GemmConfig, tile_rows: int, mean_rows: int, /) -> bool:
        """By the config of that gemm1, and the load that a permutation tells on the host."""
        ...
