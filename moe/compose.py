"""A pipeline put together for a device: which callable each stage is."""

from __future__ import annotations

from functools import partial

import torch

from moe.config import MoEConfig
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference, weigh_tokens_reference
from moe.pipeline import MoEPipeline
from moe.routing.reference import select_experts_reference
from moe.runtime.device import expect_kernels
from moe.stages import CheckedStage
from moe.traced import add_maker, recipe_of


def reference_pipeline(config: MoEConfig) -> MoEPipeline:
    """The layer in plain torch, on any device: what defines the right result, and the CPU backend."""
    pipeline = MoEPipeline(
        config,
        route=partial(select_experts_reference, config=config.routing),
        permute=partial(plan_permutation_reference, config=config.planned),
        gemm1=partial(gather_gemm_reference, config=config.gemm1),
        gemm2=partial(grouped_gemm_reference, config=config.gemm2),
        finalize=partial(finalize_tokens_reference, config=config.summed),
        weigh=partial(weigh_tokens_reference, config=config.permute) if config.weighs_input else None,
    )
    return _known_by(recipe_of("reference", config), pipeline)


def _known_by(recipe: str, pipeline: MoEPipeline) -> MoEPipeline:
    """The same, with a recipe that holds in any process. What `dataclasses.replace` makes of it gets another."""
    object.__setattr__(pipeline, "recipe", recipe)
    return pipeline


def build_pipeline(config: MoEConfig, device: torch.device | str, *, uses_pdl: bool = True) -> MoEPipeline:
    """The layer for a device: our kernels on CUDA, the references elsewhere and for whatever a kernel does not take.

    Args:
        device: "cuda", "cpu" or one of them; the pipeline runs where its tensors lie.
        uses_pdl: programmatic dependent launches where kernels and GPU (compute capability 9.0 and up) have them. No
            effect on the result.

    Raises:
        ValueError: a GPU or a system that the kernels do not run on, before anything is compiled.

    Example:
        >>> config = MoEConfig.create(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
        >>> pipeline = build_pipeline(config, "cuda")
        >>> output = pipeline(logits, hidden_states, w1, w2)
    """
    device = torch.device(device)
    pipeline = (
        _kernel_pipeline(config, device, uses_pdl=uses_pdl) if device.type == "cuda" else reference_pipeline(config)
    )
    return _known_by(recipe_of("built", config, uses_pdl=uses_pdl), pipeline)


def _kernel_pipeline(config: MoEConfig, device: torch.device, *, uses_pdl: bool) -> MoEPipeline:
    expect_kernels(device)
    # Here and not above: `import moe` needs neither triton nor numba, and a CPU pipeline neither.
    from moe.fused.kernels import fused_experts_for
    from moe.gemm.kernels import gemm1_for, gemm2_for, unit_size
    from moe.permute.kernels import finalizer_for, permuter_for, weigher_for
    from moe.routing.kernels import router_for

    gemms = {"gemm1": config.gemm1, "gemm2": config.gemm2}
    units = partial(unit_size, **gemms)
    route = CheckedStage(*router_for(config.routing, device, uses_pdl=uses_pdl), config.routing)
    permute = CheckedStage(*permuter_for(config.planned, device, uses_pdl=uses_pdl, unit_size=units), config.planned)
    gemm1 = CheckedStage(*gemm1_for(config.gemm1, uses_pdl=uses_pdl), config.gemm1)
    gemm2 = CheckedStage(*gemm2_for(config.gemm2, uses_pdl=uses_pdl), config.gemm2)
    finalize = CheckedStage(*finalizer_for(config.summed, device, uses_pdl=uses_pdl), config.summed)
    weigh = CheckedStage(*weigher_for(config.permute, device), config.permute) if config.weighs_input else None
    chain = (permute, gemm1, gemm2, finalize)
    fused = fused_experts_for(config.permute, **gemms, tiles=config.few_tokens, stands_for=chain, uses_pdl=uses_pdl)
    return MoEPipeline(config, route, *chain, fused=fused, weigh=weigh)


add_maker("built", build_pipeline)
add_maker("reference", lambda config, _device: reference_pipeline(config))
