"""A training pipeline put together for a device: which callable each stage is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.gemm.backward.checks import check_trained
from moe.gemm.backward.kernels import backward_stage_for, keeps_the_bits
from moe.permute.kernels import finalizer_for
from moe.routing.kernels import route_backward_for
from moe.stages import CheckedStage
from moe.training import known
from moe.training.pipeline import TrainingPipeline
from moe.tuning.tuned import tuned_pipeline


def build_training_pipeline(
    config: MoEConfig,
    device: torch.device | str,
    *,
    recompute: bool = False,
    is_tuned: bool = False,
    uses_pdl: bool = True,
) -> TrainingPipeline:
    """The layer under autograd: our kernels on CUDA, the references elsewhere.

    Args:
        recompute: keep nothing but the inputs and the permutation, and make the product before the activation anew.
        is_tuned: forward as `moe.tuning.tuned.tuned_pipeline` runs, by the tables, rather than as `moe.build_pipeline`: with the
            bits of a generator that does so.
        uses_pdl: as `moe.build_pipeline`.

    Raises:
        ValueError: a GPU or a system that the kernels do not run on, or a config without gradients: shuffled, blocked or interleaved
            weights, an activation without a derivative here, biases, weights on the experts' input.

    Example:
        >>> training = moe.build_training_pipeline(config, "cuda")
        >>> loss = training(logits, hidden_states, w1, w2).float().square().mean()
        >>> loss.backward()
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a MoEConfig, got {type(config).__name__}; MoEConfig.create makes one")
    check_trained(config.gemm1, config.gemm2)
    if config.weighs_input:
        raise ValueError(
            'weight_on: expected "output", got "input", which has no gradient here; train with torch\'s own operators'
        )
    if config.has_biases:
        raise ValueError(
            "has_biases: expected False, got True: biases of experts have no gradient here; train with torch's own operators"
        )
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    key = known.built_key(config, recompute=recompute, is_tuned=is_tuned, uses_pdl=uses_pdl)
    built = known.known(key, device)
    if built is not None:
        return built
    build = tuned_pipeline if is_tuned else build_pipeline
    forward: Any = build(config, device, uses_pdl=uses_pdl)

    def stage(name: str) -> CheckedStage:
        part = config.gemm1 if name.startswith("gemm1") else config.gemm2
        return CheckedStage(*backward_stage_for(name, config.gemm1, config.gemm2, device), part)

    return TrainingPipeline(
        config,
        device,
        forward,
        gemm1_keeping=stage("gemm1_keeping"),
        gemm2_dgrad=stage("gemm2_dgrad"),
        gemm1_dgrad=stage("gemm1_dgrad"),
        gemm1_wgrad=stage("gemm1_wgrad"),
        gemm2_wgrad=stage("gemm2_wgrad"),
        swiglu_gradients=stage("swiglu_gradients"),
        sum_slots=CheckedStage(*finalizer_for(config.summed, device, uses_pdl=False), config.summed),
        route_backward=CheckedStage(*route_backward_for(config.routing, device), config.routing),
        keeps_bits=partial(keeps_the_bits, device=device),
        recompute=recompute,
        key=key,
    )
