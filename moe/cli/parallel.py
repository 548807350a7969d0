"""python -m moe bench --parallel, under torchrun: exchanges and experts apart, beside plain NCCL collectives and one GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe.cli.layer import NamedLayer, random_logits
from moe.cli.machine import UnfitMachine
from moe.cli.progress import Progress
from moe.flow import TopK
from moe.parallel import ParallelLayer, build_layer
from moe.parallel.transport import Transport, transport_of
from moe.tuning.tuned import TunedPipeline, tuned_pipeline

PARALLEL_MODELS = ("deepseek-v3", "qwen3-235b-a22b")
PARALLEL_TOKENS = (1, 32, 128, 1024, 4096)
LINK_BYTES_PER_S = {"NVIDIA H100": 450e9, "NVIDIA H200": 450e9}  # NVLink 4, a direction
EXCHANGES = {"cuda": ("gather", "move", "symmetric_gather", "symmetric_move"), "cpu": ("gather", "move")}
WAITS = ("move",)  # for the host, so that no graph can hold it
GRAPH_US, MAX_CALLS, NUM_REPLAYS = 4000.0, 40, 9
NUM_EAGER = 9
ERROR_LIMIT = 1e-2


@dataclass(frozen=True)
class Parts:
    """Microseconds of one way to run the layer, the slowest rank's medians, and what it moves."""

    dispatch_us: float
    experts_us: float
    combine_us: float
    whole_us: float  # in a CUDA graph where there can be one
    eager_us: float  # by the clock, the host's work in it
    dispatch_bytes: int  # that a rank sends to others, in the mean over ranks
    combine_bytes: int
    error: float | None = None  # relative Frobenius, against one rank with all experts

    def report(self, link_bytes_per_s: float | None) -> dict[str, object]:
        shares: dict[str, float | None] = {}
        for name, num_bytes, us in (
            ("dispatch", self.dispatch_bytes, self.dispatch_us),
            ("combine", self.combine_bytes, self.combine_us),
        ):
            rate = 1e6 * num_bytes / us
            shares[f"{name}_bytes_per_s"] = rate
            shares[f"{name}_share_of_link"] = rate / link_bytes_per_s if link_bytes_per_s else None
        return asdict(self) | shares


@dataclass(frozen=True)
class ParallelLine:
    """A layer at one number of tokens a rank."""

    model: str
    num_tokens: int
    num_ranks: int
    parts: dict[str, Parts]
    one_rank_us: float | None  # all experts, all ranks' tokens

    def report(self, link_bytes_per_s: float | None) -> dict[str, object]:
        return {
            "model": self.model,
            "tokens_a_rank": self.num_tokens,
            "num_ranks": self.num_ranks,
            "one_rank_us": self.one_rank_us,
            "exchanges": {name: parts.report(link_bytes_per_s) for name, parts in self.parts.items()},
        }

    def text(self) -> str:
        cells = [
            f"{name} {p.dispatch_us:.1f} + {p.experts_us:.1f} + {p.combine_us:.1f}, whole {p.whole_us:.1f}, eager {p.eager_us:.1f}"
            for name, p in self.parts.items()
        ]
        one = "" if self.one_rank_us is None else f"; one rank {self.one_rank_us:.1f}"
        return f"{self.model}, {self.num_tokens:,} tokens a rank, us: " + "; ".join(cells) + one


def start_ranks() -> torch.device:
    """This process as a rank of torchrun's: NCCL where each has a GPU, else gloo.

    Raises:
        UnfitMachine: not started by torchrun.
    """
    import torch.distributed as dist

    if "LOCAL_RANK" not in os.environ:
        raise UnfitMachine(
            "--parallel: expected to be started by torchrun; run torchrun --nproc-per-node=2 -m moe bench --parallel"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() > local_rank:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def link_bytes_per_s(device: torch.device) -> float | None:
    """Of a direction, by the device's name; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for known, rate in LINK_BYTES_PER_S.items() if name.startswith(known)), None)


def measure_parallel(
    layers: Sequence[NamedLayer],
    token_counts: Sequence[int],
    group: Any,
    device: torch.device,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Iterator[ParallelLine]:
    """A line a layer and number of tokens a rank; all ranks go through it together."""
    transport = transport_of(group)
    for named in layers:
        bench = _bench_of(named, transport, device, seed=seed)
        for num_tokens in token_counts:
            if progress is not None:
                progress.step(f"{named.name}, {num_tokens:,} tokens a rank on {transport.num_ranks} ranks")
            yield _measure(bench, num_tokens, seed)
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Bench:
    """One layer's weights and its pipeline of all experts, on every rank the same."""

    named: NamedLayer
    transport: Transport
    device: torch.device
    w1: Tensor
    w2: Tensor
    one_rank: TunedPipeline
    own: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def weights_of(self, experts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if experts not in self.own:
            self.own[experts] = self.w1[list(experts)], self.w2[list(experts)]
        return self.own[experts]


@dataclass(frozen=True)
class _Inputs:
    """This rank's, and all ranks' one after another."""

    topk: TopK
    hidden_states: Tensor
    all_topk: TopK
    all_hidden_states: Tensor


def _bench_of(named: NamedLayer, transport: Transport, device: torch.device, *, seed: int) -> _Bench:
    config = named.config
    generator = torch.Generator(device=device).manual_seed(seed)
    w1, w2 = (
        torch.empty(gemm.weight_shape, dtype=torch.bfloat16, device=device) for gemm in (config.gemm1, config.gemm2)
    )
    for expert in range(config.num_experts):
        w1[expert].normal_(0.0, config.hidden_size**-0.5, generator=generator)
        w2[expert].normal_(0.0, config.intermediate_size**-0.5, generator=generator)
    return _Bench(named, transport, device, w1, w2, tuned_pipeline(config, device))


def _inputs(bench: _Bench, num_tokens: int, seed: int) -> _Inputs:
    config, transport = bench.named.config, bench.transport
    generator = torch.Generator(device=bench.device).manual_seed(1 + seed + transport.rank)
    logits = random_logits(num_tokens, config.num_experts, "uniform", generator)
    values, ids = logits.topk(config.top_k, dim=1)
    topk = TopK(ids.int().contiguous(), values.softmax(1).contiguous())
    x = torch.empty(num_tokens, config.hidden_size, dtype=torch.bfloat16, device=bench.device)
    x.normal_(generator=generator)
    gathered = TopK(transport.all_gather("ids", topk.expert_ids), transport.all_gather("weights", topk.weights))
    return _Inputs(topk, x, gathered, transport.all_gather("tokens", x))


def _measure(bench: _Bench, num_tokens: int, seed: int) -> ParallelLine:
    inputs, transport = _inputs(bench, num_tokens, seed), bench.transport
    first = transport.rank * num_tokens

    def alone() -> Tensor:
        return bench.one_rank.run_experts(inputs.all_topk, inputs.all_hidden_states, bench.w1, bench.w2)

    wanted = alone()[first : first + num_tokens]
    one_rank_us = _graph_us(alone, transport, bench.device)
    parts = {}
    if bench.device.type == "cuda":
        parts["nccl"] = _measure_plain(bench, inputs, wanted)
    for name in EXCHANGES[bench.device.type]:
        layer = build_layer(bench.named.config, transport, bench.device, exchange=name, max_tokens=num_tokens)
        parts[name] = _measure_exchange(name, layer, bench, inputs, wanted)
    return ParallelLine(bench.named.name, num_tokens, transport.num_ranks, parts, one_rank_us)


def _measure_exchange(name: str, layer: ParallelLayer, bench: _Bench, inputs: _Inputs, wanted: Tensor) -> Parts:
    is_captured = name not in WAITS
    w1, w2 = bench.weights_of(layer.local_experts)
    dispatched = layer.dispatch(inputs.hidden_states, inputs.topk)
    rows = layer.run_local(dispatched, w1, w2)
    output = layer.combine(rows, dispatched)
    halves = [
        lambda: layer.dispatch(inputs.hidden_states, inputs.topk),
        lambda: layer.run_local(dispatched, w1, w2),
        lambda: layer.combine(rows, dispatched),
        lambda: layer.run_experts(inputs.topk, inputs.hidden_states, w1, w2),
    ]
    sent, returned = _bytes_of(layer, inputs, selects=name.endswith("move"))
    return _parts(halves, bench, [is_captured, True, is_captured, is_captured], sent, returned, output, wanted)


def _measure_plain(bench: _Bench, inputs: _Inputs, wanted: Tensor) -> Parts:
    """The baseline: NCCL's all-gathers and reduce-scatter, written plainly around the pipeline of a slice of experts."""
    import torch.distributed as dist

    config, transport, group = bench.named.config, bench.transport, bench.transport.group
    layer = build_layer(config, transport, bench.device)
    experts, x, topk = layer.local_experts, inputs.hidden_states, inputs.topk
    local = {"num_local_experts": len(experts), "local_expert_offset": experts[0]}
    sliced = config.model_copy(
        update={
            "permute": config.permute.model_copy(update=local),
            "gemm1": config.gemm1.model_copy(update={"num_experts": len(experts)}),
            "gemm2": config.gemm2.model_copy(update={"num_experts": len(experts)}),
        }
    )
    pipeline = tuned_pipeline(sliced, bench.device)
    w1, w2 = bench.weights_of(experts)
    gathered = replace(
        inputs.all_topk,
        expert_ids=torch.empty_like(inputs.all_topk.expert_ids),
        weights=torch.empty_like(inputs.all_topk.weights),
    )
    rows, output = torch.empty_like(inputs.all_hidden_states), torch.empty_like(x)

    def gather() -> None:
        dist.all_gather_into_tensor(rows, x, group=group)
        dist.all_gather_into_tensor(gathered.expert_ids, topk.expert_ids, group=group)
        dist.all_gather_into_tensor(gathered.weights, topk.weights, group=group)

    def whole() -> Tensor:
        gather()
        dist.reduce_scatter_tensor(output, pipeline.run_experts(gathered, rows, w1, w2), group=group)
        return output

    found = whole().clone()
    partial = pipeline.run_experts(gathered, rows, w1, w2)
    halves: list[Callable[[], object]] = [
        gather,
        lambda: pipeline.run_experts(gathered, rows, w1, w2),
        lambda: dist.reduce_scatter_tensor(output, partial, group=group),
        whole,
    ]
    others = transport.num_ranks - 1
    slots = 2 * topk.expert_ids.nbytes
    return _parts(halves, bench, [True] * 4, others * (x.nbytes + slots), others * x.nbytes, found, wanted)


def _parts(
    halves: Sequence[Callable[[], object]],
    bench: _Bench,
    is_captured: Sequence[bool],
    sent: int,
    returned: int,
    output: Tensor,
    wanted: Tensor,
) -> Parts:
    transport, device = bench.transport, bench.device
    dispatch, experts, combine, whole = (
        _graph_us(call, transport, device) if captured else _eager_us(call, transport, device)
        for call, captured in zip(halves, is_captured)
    )
    norm = wanted.float().norm().item()
    error = (output.float() - wanted.float()).norm().item() / norm if norm else 0.0
    error = _largest(error, transport, device)
    eager = _eager_us(halves[3], transport, device)
    return Parts(dispatch, experts, combine, whole, eager, sent, returned, error)


def _bytes_of(layer: ParallelLayer, inputs: _Inputs, *, selects: bool) -> tuple[int, int]:
    """Bytes that a rank sends to others in each phase, in the mean over ranks."""
    transport = layer.transport
    row, slots = inputs.hidden_states[0].nbytes, 2 * inputs.topk.expert_ids[0].nbytes
    num_tokens = inputs.hidden_states.shape[0]
    others = transport.num_ranks - 1
    if not selects:
        return others * num_tokens * (row + slots), others * num_tokens * row
    table = torch.tensor([ranks[0] for ranks in layer.placement.ranks_of_expert])
    rank_of_slot = table[inputs.all_topk.expert_ids.long().cpu()]
    source = torch.arange(len(rank_of_slot)) // num_tokens
    pairs = sum(int(((rank_of_slot == rank).any(1) & (source != rank)).sum()) for rank in range(transport.num_ranks))
    mean = pairs // transport.num_ranks
    return mean * (row + slots), mean * row


def _graph_us(call: Callable[[], object], transport: Transport, device: torch.device) -> float:
    """The slowest rank's median over replays of a CUDA graph of several calls; on a CPU by the clock."""
    if device.type != "cuda":
        return _eager_us(call, transport, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    # All ranks capture as many calls: what the slowest took says how many.
    estimate = _eager_us(call, transport, device, num_samples=2)
    num_calls = max(1, min(MAX_CALLS, int(GRAPH_US / estimate)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            call()
    samples = []
    for _ in range(NUM_REPLAYS):
        _meet(transport, device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # while it runs, the host gets ahead, and ranks that began later catch up
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / num_calls)
    return _largest(statistics.median(samples), transport, device)


def _eager_us(
    call: Callable[[], object], transport: Transport, device: torch.device, *, num_samples: int = NUM_EAGER
) -> float:
    """The slowest rank's median by the clock, from when all ranks are there until its device is done."""
    samples = []
    call()
    for _ in range(num_samples):
        _meet(transport, device)
        start = time.perf_counter()
        call()
        _finish(device)
        samples.append(1e6 * (time.perf_counter() - start))
    return _largest(statistics.median(samples), transport, device)


def _meet(transport: Transport, device: torch.device) -> None:
    """All ranks are here, and their devices have nothing left to do."""
    transport.all_gather("start", torch.zeros(1, device=device))
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest(value: float, transport: Transport, device: torch.device) -> float:
    return transport.all_gather("times", torch.tensor([value], dtype=torch.float64, device=device)).max().item()
