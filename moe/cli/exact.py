"""The layer's error against float64, and its choices against the routing reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.cli.layer import Inputs, Layer
from moe.cli.progress import Progress
from moe.gemm.config import GemmConfig
from moe.gemm.reference import activate_reference
from moe.gemm.weight_format import unpack_weights
from moe.routing.reference import select_experts_reference

ERROR_LIMIT = 1e-2  # relative Frobenius; three roundings to bf16 give 4e-3 to 6e-3
MIN_SAME_CHOICES = 0.999  # a tie within a rounding may go either way


@dataclass(frozen=True)
class Accuracy:
    """Over `num_checked` tokens."""

    num_checked: int
    relative_frobenius: float  # ||output - exact|| / ||exact||
    worst_error: float  # largest |output - exact| of any element
    worst_exact: float  # the exact value there
    worst_token: int
    worst_column: int
    same_choices: float  # share of expert ids that the routing reference also chose, in the same place

    @property
    def is_close(self) -> bool:
        return self.relative_frobenius <= ERROR_LIMIT

    @property
    def chooses_alike(self) -> bool:
        return self.same_choices > MIN_SAME_CHOICES

    @property
    def is_good(self) -> bool:
        return self.is_close and self.chooses_alike


def check_accuracy(layer: Layer, inputs: Inputs, max_tokens: int, progress: Progress) -> Accuracy:
    """Hold the layer's output against float64, on at most `max_tokens` tokens that lie evenly over the batch.

    The experts' part is computed from the layer's own choices and weights, one expert at a time; the choices are compared
    with the routing reference apart, since a tie may go either way within a rounding.
    """
    num_tokens = inputs.logits.shape[0]
    num_checked = min(num_tokens, max_tokens)
    token = torch.arange(num_checked, device=layer.device) * num_tokens // num_checked
    exact = _experts_in_float64(layer, inputs, token, progress)
    output = inputs.output[token].double()
    error = (output - exact).abs().nan_to_num(nan=torch.inf)
    worst = int(error.argmax())
    row, column = divmod(worst, exact.shape[1])
    norm = torch.linalg.vector_norm(exact).item()
    expected = select_experts_reference(inputs.logits[token], layer.bias, config=layer.config.routing)
    return Accuracy(
        num_checked=num_checked,
        relative_frobenius=torch.linalg.vector_norm(error).item() / norm if norm else float(error.max()),
        worst_error=error.flatten()[worst].item(),
        worst_exact=exact.flatten()[worst].item(),
        worst_token=int(token[row]),
        worst_column=column,
        same_choices=(expected.expert_ids == inputs.topk.expert_ids[token]).double().mean().item(),
    )


def _experts_in_float64(layer: Layer, inputs: Inputs, token: Tensor, progress: Progress) -> Tensor:
    """[len(token), H]: the layer from its expert ids on, with no rounding at all."""
    first = layer.config.permute.local_expert_offset
    hidden_states = inputs.hidden_states[token].double()
    ids, scales = inputs.topk.expert_ids[token] - first, inputs.topk.weights[token].double()
    output = torch.zeros_like(hidden_states)
    for expert in range(layer.shape.num_local_experts):
        progress.tick(expert, layer.shape.num_local_experts)
        row, choice = (ids == expert).nonzero(as_tuple=True)
        if not len(row):
            continue
        w1 = _logical_weights(layer.w1, layer.config.gemm1, expert)
        w2 = _logical_weights(layer.w2, layer.config.gemm2, expert)
        inner = hidden_states[row] @ w1.T
        inner = activate_reference(inner, expert, layer.config.gemm1, None)
        output.index_add_(0, row, (inner @ w2.T) * scales[row, choice, None])
    return output


def _logical_weights(weights: Tensor, config: GemmConfig, expert: int) -> Tensor:
    """[N, K] float64 of one expert, gate rows first."""
    return unpack_weights(weights[expert : expert + 1], config.weight_format, is_gated=config.is_gated)[0].double()
