"""A layer of experts as serving engines describe and call it: what of it this package computes, and one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.expert_ids import mapped_ids
from moe.gemm.config import ActivationType
from moe.integrations.hf_experts import Gate
from moe.operators import run_experts_into
from moe.runtime.device import expect_kernels


class EngineLayer(NamedTuple):  # a tuple, which torch.compile can follow
    """The experts of one layer that are on this rank. Their weights lie as Hugging Face's: MajorK, and mostly gate rows first."""

    hidden_size: int
    intermediate_size: int  # this rank's part
    num_local_experts: int
    top_k: int
    activation: ActivationType = ActivationType.Swiglu
    gate: Gate = Gate()
    is_batch_invariant: bool = False
    weighs_input: bool = False  # weights go into the input of experts
    is_interleaved: bool = False  # gate and up rows are neighbours

    @property
    def words(self) -> str:
        """For a line in a log."""
        return (
            f"{self.num_local_experts} experts here, top_k {self.top_k}, hidden_size {self.hidden_size}, intermediate_size "
            f"{self.intermediate_size}, {self.activation.name}"
        )


def why_not(layer: EngineLayer, dtype: torch.dtype, device: torch.device) -> str | None:
    """The field of a layer that this package does not compute, what was wanted and what came; None where it computes it."""
    if dtype != torch.bfloat16:
        return f"dtype: expected bfloat16, got {str(dtype).removeprefix('torch.')}"
    for name, number in _positive(layer).items():
        if number is not None and not number > 0:
            return f"{name}: expected a positive number, got {number}"
    try:
        if device.type == "cuda":
            expect_kernels(device)
        MoEConfig.create(
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            num_experts=max(layer.num_local_experts, layer.top_k),
            num_local_experts=layer.num_local_experts,
            top_k=layer.top_k,
            activation=layer.activation,
            is_batch_invariant=layer.is_batch_invariant,
            weight_on="input" if layer.weighs_input else "output",
        )
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _positive(layer: EngineLayer) -> dict[str, float | None]:
    """Numbers of the gate without a meaning elsewhere: a limit of 0 would be a layer of zeros, and situ divides by its two."""
    if layer.activation == ActivationType.Situ:
        return {"alpha of situ": layer.gate.alpha, "beta of situ": layer.gate.beta}
    return {"limit of the gate": layer.gate.clamp_limit}


def local_ids(expert_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Ids of experts anywhere -> ids of this rank's, -1 for another rank's and for what is no expert at all.

    Args:
        expert_ids: [T, K] int32 or int64; -1 on padding, and stale numbers of any size on rows that nobody reads.
        expert_map: [E] int32, the place of each expert on this rank or -1: any map, not only a range. None: all are here.
    """
    if expert_map is None:
        return expert_ids
    return mapped_ids(expert_ids, expert_map)


def call_layer(
    layer: EngineLayer,
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    output: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The weighted sum of the chosen experts that are here: hidden_states [T, H] bfloat16 -> [T, H], in `output` where given.

    Reads `w1` and `w2` where they lie at each call, waits for nothing, and allocates by T alone.

    Args:
        expert_ids: [T, K] of any integer dtype, of this rank; others are skipped.
        expert_weights: [T, K] of any floating dtype.
        biases: [E, rows of w1] and [E, H] bfloat16 or float32, in the order of the weights' rows.
    """
    gate = layer.gate
    return run_experts_into(
        output,
        hidden_states,
        expert_ids,
        expert_weights,
        w1,
        w2,
        int(layer.activation),
        0,
        layer.is_batch_invariant,
        gate.alpha,
        gate.beta,
        gate.clamp_limit,
        *biases,
        layer.is_interleaved,
        layer.weighs_input,
    )
