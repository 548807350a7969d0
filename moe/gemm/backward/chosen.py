"""The backward stages that run in a forward GEMM's kernels: by the one that is fastest for the GPU, the problem and the load."""

from __future__ import annotations

from torch import Tensor

from moe.flow import KeptGemm1, Permutation, SwigluParams
from moe.gemm.backward.checks import check_gemm1_dgrad, check_gemm1_keeping
from moe.gemm.backward.keeping import launch_portable_gemm1_keeping
from moe.gemm.backward.transposed import transposed
from moe.gemm.config import GemmConfig
from moe.gemm.kernels import kernel_for, launch_gemm2


def run_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """gemm1, and the product before its activation; arguments, result and errors as `gemm1_keeping_reference`.

    The activation has the bits of `run_gemm1` of the same call.
    """
    check_gemm1_keeping(config, hidden_states, weights, permutation, swiglu)
    return launch_gemm1_keeping(hidden_states, weights, permutation, config=config, swiglu=swiglu)


def launch_gemm1_keeping(
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    config: GemmConfig,
    swiglu: SwigluParams | None = None,
) -> KeptGemm1:
    """`run_gemm1_keeping` of tensors that were checked."""
    kernel = kernel_for("gemm1", config, permutation.tile_rows, permutation.mean_rows, hidden_states.device)
    kept = launch_portable_gemm1_keeping(hidden_states, weights, permutation, config=config, swiglu=swiglu)
    if kernel.family == "portable":
        return kept
    # That one keeps nothing: it runs beside one that does, for the bits of the forward pass.
    return kept._replace(
        activation=kernel.launch(hidden_states, weights, permutation, config=config, swiglu=swiglu, uses_pdl=False)
    )


def run_gemm1_dgrad(grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig) -> Tensor:
    """grad_gate_up @ W1[expert_of_row]; arguments, result and errors as `gemm1_dgrad_reference`. Padding rows are not written."""
    check_gemm1_dgrad(config, grad_gate_up, weights, permutation)
    return launch_gemm1_dgrad(grad_gate_up, weights, permutation, config=config)


def launch_gemm1_dgrad(
    grad_gate_up: Tensor, weights: Tensor, permutation: Permutation, *, config: GemmConfig
) -> Tensor:
    """`run_gemm1_dgrad` of tensors that were checked: a gemm2 by the transposed weight."""
    return launch_gemm2(grad_gate_up, weights, permutation, config=transposed(config))
