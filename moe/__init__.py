"""A bf16 Mixture-of-Experts layer in five stages: route -> permute -> gemm1 -> gemm2 -> finalize.

Names are imported when they are asked for: engines look into this package at every start, for plug-ins that mostly sleep.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.compose import build_pipeline, reference_pipeline
    from moe.config import MoEConfig
    from moe.flow import Added, ExpertOutputs, Permutation, SwigluParams, TopK
    from moe.fused.few_tokens.config import FewTokenTiles, MatvecTile
    from moe.gemm.config import (
        FLASHINFER,
        ActivationType,
        GemmConfig,
        GemmTile,
        SwigluNumbers,
        WeightFormat,
        WeightLayout,
    )
    from moe.packing.flat import FlatWeights, flat_weights
    from moe.packing.mistakes import check_packing
    from moe.permute.config import FinalizeConfig, PermuteConfig
    from moe.pipeline import MoEPipeline
    from moe.routing.config import RoutingConfig, RoutingMethod, RoutingMethodType
    from moe.routing.reference import weigh_experts
    from moe.shapes import NAMED_SHAPES, MoEShape
    from moe.training.compose import build_training_pipeline
    from moe.training.experts import GradBuffers
    from moe.training.pipeline import TrainingPipeline
    from moe.trtllm import trtllm_bf16_moe, trtllm_bf16_routed_moe, trtllm_fused_moe_workspace_size

__all__ = [
    "FLASHINFER",
    "NAMED_SHAPES",
    "ActivationType",
    "Added",
    "ExpertOutputs",
    "FewTokenTiles",
    "FinalizeConfig",
    "FlatWeights",
    "GemmConfig",
    "GemmTile",
    "GradBuffers",
    "MatvecTile",
    "MoEConfig",
    "MoEPipeline",
    "MoEShape",
    "Permutation",
    "PermuteConfig",
    "RoutingConfig",
    "RoutingMethod",
    "RoutingMethodType",
    "SwigluNumbers",
    "SwigluParams",
    "TopK",
    "TrainingPipeline",
    "WeightFormat",
    "WeightLayout",
    "build_pipeline",
    "build_training_pipeline",
    "check_packing",
    "flat_weights",
    "reference_pipeline",
    "trtllm_bf16_moe",
    "trtllm_bf16_routed_moe",
    "trtllm_fused_moe_workspace_size",
    "weigh_experts",
]

_NAMES_OF_MODULE = {
    "moe.compose": (
        "build_pipeline",
        "reference_pipeline",
    ),
    "moe.config": ("MoEConfig",),
    "moe.flow": (
        "Added",
        "ExpertOutputs",
        "Permutation",
        "SwigluParams",
        "TopK",
    ),
    "moe.fused.few_tokens.config": (
        "FewTokenTiles",
        "MatvecTile",
    ),
    "moe.gemm.config": (
        "ActivationType",
        "FLASHINFER",
        "GemmConfig",
        "GemmTile",
        "SwigluNumbers",
        "WeightFormat",
        "WeightLayout",
    ),
    "moe.packing.flat": (
        "FlatWeights",
        "flat_weights",
    ),
    "moe.packing.mistakes": ("check_packing",),
    "moe.permute.config": (
        "FinalizeConfig",
        "PermuteConfig",
    ),
    "moe.pipeline": ("MoEPipeline",),
    "moe.routing.config": (
        "RoutingConfig",
        "RoutingMethod",
        "RoutingMethodType",
    ),
    "moe.routing.reference": ("weigh_experts",),
    "moe.shapes": (
        "MoEShape",
        "NAMED_SHAPES",
    ),
    "moe.training.compose": ("build_training_pipeline",),
    "moe.training.experts": ("GradBuffers",),
    "moe.training.pipeline": ("TrainingPipeline",),
    "moe.trtllm": (
        "trtllm_bf16_moe",
        "trtllm_bf16_routed_moe",
        "trtllm_fused_moe_workspace_size",
    ),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        module = _MODULE_OF_NAME.get(name)
        if module is not None:
            value = getattr(importlib.import_module(module), name)
        elif name.startswith("_"):
            raise AttributeError(f"module 'moe' has no attribute {name!r}")
        else:
            try:
                value = importlib.import_module(f"moe.{name}")  # moe.tuning, say, after `import moe`
            except ModuleNotFoundError as error:
                if error.name != f"moe.{name}":
                    raise
                raise AttributeError(f"module 'moe' has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
