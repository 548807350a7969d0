"""One layer of a named model: config, random weights and inputs, and pipeline, on the device that is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.cli.progress import Progress
from moe.config import MoEConfig
from moe.flow import Permutation, TopK
from moe.gemm.config import FLASHINFER, ActivationType, WeightFormat
from moe.pipeline import MoEPipeline, build_pipeline
from moe.shapes import MoEShape

FORMATS = {"hf": WeightFormat(), "flashinfer": FLASHINFER}
ROUTINGS = ("uniform", "zipf")
UNWANTED = 50.0  # taken off a logit, keeps its expert from being chosen


@dataclass(frozen=True)
class Layer:
    """Weights are random normal over sqrt(fan-in), made in the format that the kernels read."""

    shape: MoEShape
    config: MoEConfig
    pipeline: MoEPipeline
    w1: Tensor
    w2: Tensor
    bias: Tensor | None
    device: torch.device


@dataclass(frozen=True)
class Inputs:
    """One input set, and what each stage makes of it."""

    logits: Tensor  # [T, E] float32
    hidden_states: Tensor  # [T, H] bfloat16
    topk: TopK
    permutation: Permutation
    activation: Tensor  # [P, I] bfloat16
    rows: Tensor  # [P, H] bfloat16
    output: Tensor  # [T, H] bfloat16


def config_of_shape(shape: MoEShape, weight_format: WeightFormat) -> MoEConfig:
    """The config of a named model's layer; a shape that holds fewer experts than it routes over has the first of them."""
    return MoEConfig.create(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        method=shape.method,
        n_group=shape.n_group,
        topk_group=shape.topk_group,
        routed_scaling_factor=shape.routed_scaling_factor,
        activation=ActivationType.Swiglu if shape.is_gated else ActivationType.Relu2,
        weight_format=weight_format,
        num_local_experts=shape.num_local_experts,
    )


def make_layer(
    shape: MoEShape, device: torch.device, *, weight_format: WeightFormat, seed: int, progress: Progress
) -> Layer:
    """Fill the weights, an expert at a time, and build the pipeline."""
    config = config_of_shape(shape, weight_format)
    progress.step(
        f"making {2e-9 * shape.num_local_experts * shape.expert_weights:.2f} GB of random bf16 weights on {device}"
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    bias = None
    if config.routing.method.uses_bias:
        bias = 0.01 * torch.randn(shape.num_experts, generator=generator, device=device)
    w1, w2 = (
        torch.empty(gemm.weight_shape, dtype=torch.bfloat16, device=device) for gemm in (config.gemm1, config.gemm2)
    )
    for expert in range(shape.num_local_experts):
        w1[expert].normal_(0.0, config.hidden_size**-0.5, generator=generator)
        w2[expert].normal_(0.0, config.intermediate_size**-0.5, generator=generator)
        progress.tick(expert, shape.num_local_experts)
    return Layer(shape, config, build_pipeline(config, device), w1, w2, bias, device)


def make_inputs(layer: Layer, num_tokens: int, num_sets: int, *, routing: str, seed: int) -> list[Inputs]:
    """Input sets that do not meet in the cache: with few tokens, a set avoids the experts that those before it chose."""
    generator = torch.Generator(device=layer.device).manual_seed(seed)
    num_experts = layer.shape.num_experts
    leaves_most_idle = 4 * num_tokens * layer.shape.top_k <= num_experts
    is_used = torch.zeros(num_experts, dtype=torch.bool, device=layer.device)
    sets = []
    for _ in range(num_sets):
        logits = random_logits(num_tokens, num_experts, routing, generator)
        if leaves_most_idle and 2 * int(is_used.sum()) > num_experts:
            is_used.zero_()
        if leaves_most_idle and num_sets > 1:
            logits[:, is_used] -= UNWANTED
        sets.append(_run_stages(layer, logits, generator))
        is_used[sets[-1].topk.expert_ids.long()] = True
    return sets


def random_logits(num_tokens: int, num_experts: int, routing: str, generator: torch.Generator) -> Tensor:
    """[T, E] float32 whose top-k are draws without replacement: all experts alike, or the r-th in proportion to 1 / r.

    A Gumbel variable added to the logarithm of each probability does it. Which expert is the r-th is random.
    """
    device = generator.device
    gumbel = torch.empty(num_tokens, num_experts, device=device).exponential_(generator=generator)
    gumbel = gumbel.clamp_(min=1e-20).log_().neg_()
    if routing == "uniform":
        return gumbel
    rank = torch.randperm(num_experts, generator=torch.Generator().manual_seed(generator.initial_seed()))
    return gumbel - (rank + 1.0).log().to(device)


def _run_stages(layer: Layer, logits: Tensor, generator: torch.Generator) -> Inputs:
    hidden_states = torch.empty(
        logits.shape[0], layer.shape.hidden_size, dtype=torch.bfloat16, device=layer.device
    ).normal_(generator=generator)
    pipeline = layer.pipeline
    topk = pipeline.route(logits, layer.bias)
    permutation = pipeline.permute(topk)
    activation = pipeline.gemm1(hidden_states, layer.w1, permutation)
    rows = pipeline.gemm2(activation, layer.w2, permutation)
    output = pipeline.finalize(rows, topk, permutation)
    return Inputs(logits, hidden_states, topk, permutation, activation, rows, output)
