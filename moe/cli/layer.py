"""One layer of a named model or of a config: random weights and inputs, and pipeline, on the device that is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from moe.checks import no_case
from moe.cli.machine import UnfitMachine
from moe.cli.progress import Progress
from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.flow import Permutation, TopK
from moe.gemm.config import FLASHINFER, WeightFormat
from moe.pipeline import MoEPipeline
from moe.shapes import NAMED_SHAPES, MoEShape

FORMATS = {"hf": WeightFormat(), "flashinfer": FLASHINFER}
ROUTINGS = ("uniform", "zipf")
EXPECTED_FILE = "expected a MoEConfig or a Hugging Face config.json"
UNWANTED = 50.0  # taken off a logit, keeps its expert from being chosen


@dataclass(frozen=True)
class NamedLayer:
    """A layer's config, and what to call it."""

    name: str
    config: MoEConfig

    @property
    def shape(self) -> MoEShape:
        routing = self.config.routing
        return MoEShape(
            name=self.name,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            method=routing.method.value,
            num_local_experts=self.config.permute.num_local_experts,
            n_group=routing.n_group,
            topk_group=routing.topk_group,
            routed_scaling_factor=routing.routed_scaling_factor,
            activation=str(self.config.gemm1.activation_name),
        )


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


def layers_of(
    models: Sequence[str], file: Path | None, weight_format: str | None, number: int | None = None
) -> list[NamedLayer]:
    """The layers of named models, and that of a JSON file: a MoEConfig, or a Hugging Face config.json.

    Args:
        weight_format: a name of FORMATS; None: MajorK for named models, and what the file says or its model has.
        number: which layer of the model in a config.json; None: any, where they are alike.

    Raises:
        UnfitMachine: a file that cannot be read, or that describes no layer, or names its format beside another.
    """
    if number is not None and file is None:
        raise UnfitMachine(f"--layer {number}: expected --config FILE, of whose model it is a layer, got none")
    layers = [layer_of_shape(NAMED_SHAPES[name], FORMATS[weight_format or "hf"]) for name in dict.fromkeys(models)]
    if file is not None:
        name = file.name if number is None else f"{file.name} layer {number}"
        config = _read_config(file, weight_format, number)
        if config.weighs_input:  # stages are run one by one here, and none of the five weighs inputs
            name, config = f"{name}, weighed on the output", config.model_copy(update={"weight_on": "output"})
        if config.has_biases:
            name, config = f"{name}, without biases", config.model_copy(update={"has_biases": False})
        if config.swiglu is not None:
            name, config = (
                f"{name}, without its {' and '.join(config.swiglu.given)}",
                config.model_copy(update={"swiglu": None}),
            )
        layers.append(NamedLayer(name, config))
    return layers


def layer_of_shape(shape: MoEShape, weight_format: WeightFormat) -> NamedLayer:
    """A named model's layer; a shape that holds fewer experts than it routes over has the first of them."""
    config = MoEConfig.create(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        method=shape.method,
        n_group=shape.n_group,
        topk_group=shape.topk_group,
        routed_scaling_factor=shape.routed_scaling_factor,
        activation=shape.activation,
        weight_format=weight_format,
        num_local_experts=shape.num_local_experts,
    )
    return NamedLayer(shape.name, config)


def _read_config(file: Path, weight_format: str | None, number: int | None) -> MoEConfig:
    try:
        fields = json.loads(file.read_text())
        if isinstance(fields, dict) and "routing" in fields:
            config = MoEConfig.model_validate(fields)
            if weight_format is not None:
                raise UnfitMachine(
                    f"--format {weight_format}: {file} names its own; leave --format out, or edit the file"
                )
            if number is not None:
                raise UnfitMachine(f"--layer {number}: {file} is the config of one layer; leave --layer out")
            return config
        chosen = None if weight_format is None else FORMATS[weight_format]
        return MoEConfig.from_hf_config(fields, layer=number, weight_format=chosen)
    except UnfitMachine:
        raise
    except OSError as error:
        raise UnfitMachine(f"--config {file}: {error.strerror}; {EXPECTED_FILE}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UnfitMachine(f"--config {file}: {_line_of(error)}; {EXPECTED_FILE}") from error


def _line_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first, *more = error.errors(include_url=False, include_input=False)
        where = ".".join(map(str, first["loc"]))
        return (f"{where}: " if where else "") + first["msg"] + (f" (and {len(more)} more)" if more else "")
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error}"
    return " ".join(str(error).split())


def make_layer(named: NamedLayer, device: torch.device, *, seed: int, progress: Progress) -> Layer:
    """Fill the weights, an expert at a time, and build the pipeline."""
    config, shape = named.config, named.shape
    progress.step(f"making {1e-9 * shape.weight_bytes:.2f} GB of random bf16 weights on {device}")
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
    if routing != "zipf":
        raise no_case(routing, "moe/cli/layer.py, random_logits")
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
