"""What is wrong with weights and numbers that a flat call is going to be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.compose import reference_pipeline
from moe.config import MoEConfig
from moe.gemm.config import BLOCK_MAJOR_K, WeightFormat, WeightLayout
from moe.gemm.weight_format import convert_weights, unpack_weights
from moe.packing.checkpoint import LayerWeights, find_layer
from moe.packing.flat import FlatWeights, pack_layer
from moe.routing.config import RoutingMethodType
from moe.trtllm import trtllm_bf16_moe

NUM_TOKENS = 32
LARGEST_ERROR = 2e-2  # both sides round three times, to 4e-3 to 6e-3 each; a wrong row of weights gives 1 and more


def check_packing(
    arguments: FlatWeights | Mapping[str, Any],
    source: nn.Module | Mapping[str, Tensor] | tuple[Tensor, Tensor],
    config: MoEConfig | Mapping[str, Any] | Any,
    *,
    layer: int | None = None,
    local_expert_offset: int | None = None,
    local_num_experts: int | None = None,
) -> None:
    """Run a few random tokens by the flat call and by the weights as the checkpoint has them, and say what is wrong if they differ.

    The flat call cannot see a wrong order of rows: it gives other numbers, in silence. Memory as `flat_weights`; waits for the
    device.

    Args:
        arguments: what `moe.trtllm_bf16_moe` is going to be called with, by its names, but for logits, bias and hidden states.
        source, config, layer, local_expert_offset, local_num_experts: the truth, as in `flat_weights`.

    Raises:
        ValueError: the results differ, with each mistake that was found; or an argument that the flat call itself refuses.
    """
    given = arguments._asdict() if isinstance(arguments, FlatWeights) else dict(arguments)
    found = find_layer(source, config, layer, local_expert_offset, local_num_experts)
    try:
        error = _relative_error(given, found)
        if error <= LARGEST_ERROR:
            return
        found_out = f"the relative error of {NUM_TOKENS} tokens is {error:.2g}, expected at most {LARGEST_ERROR}"
    except (TypeError, ValueError) as refusal:
        found_out = f"the flat call refuses it: {refusal}"
    mistakes = [*_mistakes_of_weights(given, found), *_mistakes_of_numbers(given, found)]
    unknown = "no known mistake explains it: are these the weights of this layer?"
    raise ValueError(f"packing: {found_out}; " + ("; ".join(mistakes) or unknown))


def _relative_error(given: dict[str, Any], found: LayerWeights) -> float:
    """Of the flat call, against the weights as they were found."""
    config, device = found.config, found.w1.device
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(NUM_TOKENS, config.num_experts, generator=generator, device=device)
    first = config.permute.local_expert_offset
    logits[:, first : first + config.permute.num_local_experts] += 2  # so that experts that lie here are chosen
    hidden_states = torch.randn(NUM_TOKENS, config.hidden_size, generator=generator, device=device).bfloat16()
    bias = None
    if config.routing.method.uses_bias:
        bias = 0.1 * torch.randn(config.num_experts, generator=generator, device=device)
    weights = found.w1, found.w2
    wanted = reference_pipeline(config)(logits, hidden_states, *weights, bias=bias, swiglu=found.swiglu_or_none)
    got = trtllm_bf16_moe(logits, bias, hidden_states, **given | {"do_finalize": True, "output": None})
    assert isinstance(got, Tensor)
    error = torch.linalg.vector_norm(got.double() - wanted.double())
    return float(error / torch.linalg.vector_norm(wanted.double()))


def _mistakes_of_numbers(given: Mapping[str, Any], found: LayerWeights) -> list[str]:
    """Numbers of the call that are not the layer's."""
    right = pack_layer(found)._asdict()
    defaults = {"routed_scaling_factor": 1.0, "routing_method_type": 0, "activation_type": 3, "norm_topk_prob": True}
    mistakes = []
    for name, value in right.items():
        if name.startswith("gemm"):
            continue
        got = given.get(name, defaults.get(name))
        got = defaults.get(name) if got is None else got
        if (got or 0) != (value or 0):
            mistakes.append(f"{name}: expected {_named(name, value)}, got {_named(name, got)}")
    for name, tensor in found.swiglu.__dict__.items():
        if (tensor is None) != (given.get(f"gemm1_{name}") is None):
            mistakes.append(
                f"gemm1_{name}: expected {'none' if tensor is None else 'one'}; flat_weights gives what is right"
            )
    return mistakes


def _named(name: str, value: Any) -> str:
    if name == "routing_method_type" and value in list(RoutingMethodType):
        return f"{int(value)} ({RoutingMethodType(value).name})"
    return str(value)


def _mistakes_of_weights(given: Mapping[str, Any], found: LayerWeights) -> list[str]:
    """What was done to the weights, told from where their rows lie."""
    mistakes = []
    for name, weights, gemm in (
        ("gemm1_weights", found.w1, found.config.gemm1),
        ("gemm2_weights", found.w2, found.config.gemm2),
    ):
        packed = given.get(name)
        if not isinstance(packed, Tensor):
            mistakes.append(f"{name}: expected a tensor, got {type(packed).__name__}")
            continue
        logical = unpack_weights(weights[:1], gemm.weight_format, is_gated=gemm.is_gated)
        use_shuffled = bool(given.get("use_shuffled_weight", True))
        mistake = _mistake(packed[:1].to(logical.device), logical, is_gated=gemm.is_gated, use_shuffled=use_shuffled)
        if mistake:
            mistakes.append(f"{name}: {mistake}")
    return mistakes


def _mistake(packed: Tensor, logical: Tensor, *, is_gated: bool, use_shuffled: bool) -> str:
    """How the first expert's packed weights differ from what they should be; "" where they do not."""
    for is_shuffled in (use_shuffled, not use_shuffled):
        for order in ("up_gate", "gate_up") if is_gated else ("up_gate",):
            for interleaves in (True, False) if is_gated and is_shuffled else (is_gated,):
                said = []
                if is_shuffled is not use_shuffled:
                    said.append(f"rows are {'' if is_shuffled else 'not '}shuffled, use_shuffled_weight={use_shuffled}")
                if order == "gate_up":
                    said.append("halves swapped: gate rows come first, expected up rows first")
                if interleaves is not is_gated:
                    said.append("shuffled as without a gate (is_gated=False): gate and up rows are not interleaved")
                rows = _ordered(logical, order, is_gated)
                stored = WeightFormat(layout=WeightLayout.BlockMajorK, is_shuffled=is_shuffled, gate_up_order="gate_up")
                blocks = convert_weights(rows, WeightFormat(), stored, is_gated=interleaves)
                if torch.equal(packed, blocks):
                    return "; ".join(said)
                flat = blocks.transpose(1, 2).flatten(2)  # [1, N, K], rows in that order
                if torch.equal(packed.flatten(), flat.flatten()):
                    return "; ".join(
                        [*said, f"not cut into blocks of {BLOCK_MAJOR_K} columns, but reshaped or left MajorK"]
                    )
    return "its first expert is none of the checkpoint's first local expert in any order of rows that is known: other experts?"


def _ordered(logical: Tensor, order: str, is_gated: bool) -> Tensor:
    """With the halves in this order."""
    return torch.cat(logical.chunk(2, dim=1)[::-1], dim=1) if is_gated and order == "up_gate" else logical
