"""One layer's experts, packed as the flat call takes them, with the numbers that it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe.config import MoEConfig
from moe.gemm.config import FLASHINFER
from moe.gemm.weight_format import convert_weights
from moe.packing.checkpoint import LayerWeights, find_layer
from moe.routing.config import RoutingMethodType


class FlatWeights(NamedTuple):
    """Arguments of `moe.trtllm_bf16_moe`, by its names: all but the tensors of a call.

    `moe.trtllm_bf16_moe(logits, bias, hidden_states, **flat._asdict())` is a call.
    """

    gemm1_weights: Tensor  # [E_local, H/64, 2I, 64] bfloat16; I rows without a gate
    gemm2_weights: Tensor  # [E_local, I/64, H, 64] bfloat16
    num_experts: int
    top_k: int
    n_group: int | None
    topk_group: int | None
    intermediate_size: int
    local_expert_offset: int
    local_num_experts: int
    routed_scaling_factor: float
    routing_method_type: int
    activation_type: int
    norm_topk_prob: bool
    gemm1_alpha: Tensor | None = None  # [E_local] float32, where the experts have a gate of their own
    gemm1_beta: Tensor | None = None
    gemm1_clamp_limit: Tensor | None = None


def flat_weights(
    source: nn.Module | Mapping[str, Tensor] | tuple[Tensor, Tensor],
    config: MoEConfig | Mapping[str, Any] | Any,
    *,
    layer: int | None = None,
    local_expert_offset: int | None = None,
    local_num_experts: int | None = None,
) -> FlatWeights:
    """The experts of one layer, packed for the flat call, and the numbers that it is called with.

    Takes memory for the result and for one expert; where a state dict has each expert apart, for those that lie here once more.

    Args:
        source: an experts module of transformers, or a model or a part of one that has it; a state dict as transformers or a
            checkpoint has it (`experts.gate_up_proj`, or `experts.0.gate_proj.weight` and so on); or (w1, w2) as the config's
            weight_format says. bfloat16, of all experts or of those that lie here.
        config: the layer's MoEConfig, or the model's config or the content of its config.json.
        layer: which layer, counted from 0, where `source` or a model's config has several.
        local_expert_offset, local_num_experts: the experts that lie here; None: the config's, which are all if it says nothing.

    Raises:
        TypeError: a source that is none of these.
        ValueError: naming what is missing, or does not fit, or what the flat call does not take, and the cure.
    """
    return pack_layer(find_layer(source, config, layer, local_expert_offset, local_num_experts))


def pack_layer(found: LayerWeights) -> FlatWeights:
    """`flat_weights` of weights that were found."""
    config = found.config
    method = config.routing.method
    if method.value not in RoutingMethodType.__members__:
        raise ValueError(
            f"method: expected one with a number in the flat call, got {method.value}; use moe.build_pipeline, which takes "
            "weights as they are"
        )
    w1, w2 = (
        convert_weights(weights, gemm.weight_format, FLASHINFER, is_gated=gemm.is_gated)
        for weights, gemm in ((found.w1, config.gemm1), (found.w2, config.gemm2))
    )
    return FlatWeights(
        w1,
        w2,
        num_experts=config.num_experts,
        top_k=config.top_k,
        n_group=config.routing.n_group or None,
        topk_group=config.routing.topk_group or None,
        intermediate_size=config.intermediate_size,
        local_expert_offset=config.permute.local_expert_offset,
        local_num_experts=config.permute.num_local_experts,
        routed_scaling_factor=config.routing.routed_scaling_factor,
        routing_method_type=int(RoutingMethodType[method.value]),
        activation_type=int(config.gemm1.activation or 0),
        norm_topk_prob=config.routing.norm_topk_prob,
        gemm1_alpha=found.swiglu.alpha,
        gemm1_beta=found.swiglu.beta,
        gemm1_clamp_limit=found.swiglu.clamp_limit,
    )
