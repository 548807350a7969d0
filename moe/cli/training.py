"""python -m moe bench --training: experts forward and backward, beside torch's grouped_mm under autograd, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe.checks import no_case
from moe.cli.layer import Layer, NamedLayer, make_layer, random_logits
from moe.cli.machine import UnfitMachine
from moe.cli.progress import Progress
from moe.cli.text import Unit, decimal, table
from moe.flow import TopK
from moe.gemm.config import ActivationType
from moe.training.compose import build_training_pipeline
from moe.training.pipeline import TrainingPipeline
from moe.tuning.measure import Peaks

FACTOR_OF_FLOPS = 3  # each of the forward's products has two more in the backward pass
CALLS_A_SAMPLE = 3
NUM_PARTS = 16  # of a gradient that is compared
ERROR_LIMIT = 3e-2  # two bf16 gradients, each within 1e-2 of the exact one
HEADER = ("tokens", "floor", "forward", "both", "anew", "eager", "compiled", "ratio", "MiB", "share", "error")
LEGEND = """\
floor: three times the forward's operations, at the peak rate
forward, both: ours, and with the backward pass; anew: both, with recompute=True
eager, compiled: both by torch's grouped_mm; ratio: eager / both
MiB: what ours keeps for the backward pass; share: of what eager keeps
error: the largest difference of a gradient from eager's, relative"""
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (weights, x, w1, w2) -> [T, H]


@dataclass(frozen=True)
class TrainingTimes:
    """Medians over turns in microseconds by way: ours, ours that makes gate_up anew, torch's eager and compiled."""

    model: str
    num_tokens: int
    flops: float  # of the forward's products
    forward_us: dict[str, float]
    both_us: dict[str, float]
    kept_bytes: dict[str, int]  # for the backward pass, beside inputs and weights
    error: float | None  # the largest relative difference of a gradient from eager torch's

    @property
    def is_good(self) -> bool:
        return self.error is None or self.error <= ERROR_LIMIT

    def report(self, peaks: Peaks) -> dict[str, object]:
        both_us = self.both_us["ours"]
        return {
            "model": self.model,
            "num_tokens": self.num_tokens,
            "flops": FACTOR_OF_FLOPS * self.flops,
            "floor_us": self.floor_us(peaks),
            "forward_us": self.forward_us,
            "forward_and_backward_us": self.both_us,
            "tflops": 1e-6 * FACTOR_OF_FLOPS * self.flops / both_us,
            "kept_bytes": self.kept_bytes,
            "error": self.error,
        }

    def floor_us(self, peaks: Peaks) -> float:
        return 1e6 * FACTOR_OF_FLOPS * self.flops / peaks.matmul_flops


def measure_training(
    named: NamedLayer,
    token_counts: Sequence[int],
    device: torch.device,
    *,
    routing: str,
    seed: int,
    num_turns: int,
    progress: Progress,
) -> Iterator[TrainingTimes]:
    """Experts chosen before, with gradients for tokens, routing weights and both expert weights.

    Raises:
        UnfitMachine: a layer that has no gradients, as of shuffled weights.
    """
    try:
        pipelines = {
            "ours": build_training_pipeline(named.config, device),
            "anew": build_training_pipeline(named.config, device, recompute=True),
        }
    except ValueError as error:
        raise UnfitMachine(f"--training: {named.name}: {error}") from error
    layer = make_layer(named, device, seed=seed, progress=progress)
    w1, w2 = layer.w1.requires_grad_(), layer.w2.requires_grad_()
    for num_tokens in token_counts:
        topk, tokens, grad_output = _inputs(layer, num_tokens, routing, seed)
        ways: dict[str, Experts] = {
            name: partial(_run_experts, pipeline, topk.expert_ids) for name, pipeline in pipelines.items()
        }
        ways |= _ways_of_torch(layer, topk, device)
        leaves = (topk.weights.requires_grad_(), tokens.requires_grad_(), w1, w2)
        what = f"timing {named.name}, {num_tokens:,} tokens"
        progress.step(what)
        running, gradients = {}, {}
        for name, way in ways.items():
            progress.detail(f"{what}, first call of {name}")
            grads = _gradients_of(way, leaves, grad_output)
            if grads is not None:
                running[name] = way
                if name in ("ours", "eager"):
                    gradients[name] = grads
        difference = None
        if "eager" in gradients:
            difference = max(_difference(a, b) for a, b in zip(gradients["ours"], gradients["eager"]))
        del gradients
        progress.detail(what)
        forward_us, both_us = _times(running, leaves, grad_output, device, num_turns, progress)
        kept = {name: _kept_bytes(way, leaves) for name, way in running.items() if name != "compiled"}
        flops = _flops(layer, topk)
        yield TrainingTimes(named.name, num_tokens, flops, forward_us, both_us, kept, difference)
        del topk, tokens, grad_output, leaves, ways, running


def _run_experts(
    pipeline: TrainingPipeline, expert_ids: Tensor, weights: Tensor, x: Tensor, w1: Tensor, w2: Tensor
) -> Tensor:
    return pipeline.run_experts(TopK(expert_ids, weights), x, w1, w2)


def _inputs(layer: Layer, num_tokens: int, routing: str, seed: int) -> tuple[TopK, Tensor, Tensor]:
    generator = torch.Generator(device=layer.device).manual_seed(seed)
    logits = random_logits(num_tokens, layer.shape.num_experts, routing, generator)
    chosen = layer.pipeline.route(logits, layer.bias)
    shape = (num_tokens, layer.shape.hidden_size)
    tokens, grads = (torch.randn(shape, generator=generator, device=layer.device).bfloat16() for _ in range(2))
    return TopK(chosen.expert_ids, chosen.weights.clone()), tokens, grads


def _flops(layer: Layer, topk: TopK) -> float:
    first, num_local = layer.config.permute.local_expert_offset, layer.shape.num_local_experts
    num_rows = int(((topk.expert_ids >= first) & (topk.expert_ids < first + num_local)).sum())
    return sum(
        2.0 * num_rows * gemm.weight_rows * gemm.in_features for gemm in (layer.config.gemm1, layer.config.gemm2)
    )


def _ways_of_torch(layer: Layer, topk: TopK, device: torch.device) -> dict[str, Experts]:
    """Eager and compiled; none for layers whose experts lie on several ranks."""
    if layer.shape.num_local_experts != layer.shape.num_experts or layer.config.gemm1.activation is None:
        return {}
    activation, num_experts = layer.config.gemm1.activation, layer.shape.num_experts

    def eager(weights: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return grouped_experts(weights, x, w1, w2, topk.expert_ids, activation, num_experts)

    ways: dict[str, Experts] = {"eager": eager}
    if device.type == "cuda":
        torch.compiler.reset()
        ways["compiled"] = torch.compile(eager, dynamic=False)
    return ways


def grouped_experts(
    weights: Tensor, x: Tensor, w1: Tensor, w2: Tensor, expert_ids: Tensor, activation: ActivationType, num_experts: int
) -> Tensor:
    """What is written with torch alone: sort, grouped_mm, activation, grouped_mm, index_add. Weights are [E, N, K], gate rows first."""
    grouped_mm: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    slot_experts = expert_ids.flatten()
    order = slot_experts.argsort()
    token = order // expert_ids.shape[1]
    counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
    counts = counts.index_add(0, slot_experts, torch.ones_like(slot_experts))
    ends = counts.cumsum(0).to(torch.int32)
    product = grouped_mm(x[token], w1.transpose(1, 2), offs=ends)
    rows = grouped_mm(_activated(product, activation), w2.transpose(1, 2), offs=ends)
    weighted = rows * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted)


def _activated(product: Tensor, activation: ActivationType) -> Tensor:
    match activation:
        case ActivationType.Swiglu:
            gate, up = product.chunk(2, dim=1)
            return functional.silu(gate) * up
        case ActivationType.Relu2:
            return functional.relu(product).square()
    raise no_case(activation, "moe/cli/training.py, _activated")


def _gradients_of(way: Experts, leaves: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...] | None:
    """None where torch's grouped_mm does not run: it needs some GPUs and refuses some shapes."""
    try:
        return torch.autograd.grad(way(*leaves), leaves, grad_output)
    except (RuntimeError, NotImplementedError):
        return None


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, Frobenius, in float32 a part at a time: weights' gradients are large."""
    squares = torch.zeros(2, dtype=torch.float64, device=ours.device)
    for part, other in zip(ours.chunk(NUM_PARTS), theirs.chunk(NUM_PARTS)):
        other = other.float()
        squares += torch.stack(((part.float() - other).square().sum(), other.square().sum()))
    difference, size = squares.sqrt().tolist()
    return difference / size if difference else 0.0


def _times(
    ways: dict[str, Experts],
    leaves: Sequence[Tensor],
    grad_output: Tensor,
    device: torch.device,
    num_turns: int,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward with what it keeps, and forward and backward, by turns."""

    def ahead(way: Experts) -> None:
        way(*leaves)

    def both(way: Experts) -> None:
        torch.autograd.grad(way(*leaves), leaves, grad_output)

    forward: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    turns = max(num_turns, 1)
    for turn in range(turns):
        for number, (name, way) in enumerate(ways.items()):
            progress.tick(turn * len(ways) + number, turns * len(ways))
            forward[name].append(_sample_us(partial(ahead, way), device))
            whole[name].append(_sample_us(partial(both, way), device))
    return {n: median(us) for n, us in forward.items()}, {n: median(us) for n, us in whole.items()}


def _sample_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds a call, several called one after another: on a GPU between events, so that it is never waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    call()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(CALLS_A_SAMPLE):
        call()
    last.record()
    last.synchronize()
    return 1e3 * first.elapsed_time(last) / CALLS_A_SAMPLE


def _kept_bytes(way: Experts, leaves: Sequence[Tensor]) -> int:
    """Of all memory that autograd keeps, the leaves' own left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = way(*leaves)
    del output
    leaves_at = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return sum(size for at, size in sizes.items() if at not in leaves_at)


def training_table(lines: Sequence[TrainingTimes], peaks: Peaks, unit: Unit) -> str:
    """A line a token count, of one layer."""
    rows = []
    for line in lines:
        both, eager = line.both_us, line.both_us.get("eager")
        times = (line.floor_us(peaks), line.forward_us["ours"], both["ours"], both["anew"], eager, both.get("compiled"))
        kept, eagers = line.kept_bytes["ours"], line.kept_bytes.get("eager")
        rows.append(
            (
                f"{line.num_tokens:,}",
                *("-" if us is None else unit.format(us) for us in times),
                "-" if eager is None else decimal(eager / both["ours"]),
                decimal(kept / 2**20),
                "-" if not eagers else f"{100 * kept / eagers:.0f}%",
                "-" if line.error is None else _error_text(line),
            )
        )
    shown = [n for n in range(len(HEADER)) if any(row[n] != "-" for row in rows)]
    cells = [[line[n] for n in shown] for line in (HEADER, *rows)]
    return f"{table(cells[0], cells[1:])}\n{LEGEND}"


def _error_text(line: TrainingTimes) -> str:
    return f"{line.error:.1e}".replace("e-0", "e-") + ("" if line.is_good else " WRONG")
