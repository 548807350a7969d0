"""A bf16 Mixture-of-Experts layer in five stages: route -> permute -> gemm1 -> gemm2 -> finalize."""

from moe.compose import build_pipeline, reference_pipeline
from moe.config import MoEConfig
from moe.flow import ExpertOutputs, Permutation, SwigluParams, TopK
from moe.gemm.config import FLASHINFER, ActivationType, GemmConfig, GemmTile, WeightFormat, WeightLayout
from moe.packing.flat import FlatWeights, flat_weights
from moe.packing.mistakes import check_packing
from moe.permute.config import FinalizeConfig, PermuteConfig
from moe.pipeline import MoEPipeline
from moe.routing.config import RoutingConfig, RoutingMethod, RoutingMethodType
from moe.routing.reference import weigh_experts
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.trtllm import trtllm_bf16_moe, trtllm_bf16_routed_moe, trtllm_fused_moe_workspace_size

__all__ = [
    "FLASHINFER",
    "NAMED_SHAPES",
    "ActivationType",
    "ExpertOutputs",
    "FinalizeConfig",
    "FlatWeights",
    "GemmConfig",
    "GemmTile",
    "MoEConfig",
    "MoEPipeline",
    "MoEShape",
    "Permutation",
    "PermuteConfig",
    "RoutingConfig",
    "RoutingMethod",
    "RoutingMethodType",
    "SwigluParams",
    "TopK",
    "WeightFormat",
    "WeightLayout",
    "build_pipeline",
    "check_packing",
    "flat_weights",
    "reference_pipeline",
    "trtllm_bf16_moe",
    "trtllm_bf16_routed_moe",
    "trtllm_fused_moe_workspace_size",
    "weigh_experts",
]
