"""gemm1 that keeps the product before its activation, on every GPU."""

from __future__ import annotations

from torch import Tensor

from moe.flow import KeptGemm1, Permutation, SwigluParams
from moe.gemm.backward.checks import check_gemm1_keeping
from moe.gemm.config import GemmConfig
from moe.gemm.portable.gemm1 import launch_portable_gemm1
from moe.runtime.scratch import new_scratch


def portable_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """`portable_gemm1`, and the product before its activation; arguments, result and errors as `gemm1_keeping_reference`."""
    check_gemm1_keeping(config, hidden_states, weights, permutation, swiglu)
    return launch_portable_gemm1_keeping(hidden_states, weights, permutation, config=config, swiglu=swiglu)


def launch_portable_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """`portable_gemm1_keeping` of tensors that were checked."""
    kept = new_scratch(hidden_states, (permutation.max_rows, config.weight_rows))
    return KeptGemm1(
        launch_portable_gemm1(hidden_states, weights, permutation, config=config, swiglu=swiglu, kept=kept), kept
    )
