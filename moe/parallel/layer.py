"""A layer over several ranks: an exchange around a pipeline of this rank's experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.call import LayerCall, check_call
from moe.checks import expect_type
from moe.config import MoEConfig
from moe.flow import Added, SwigluParams, TopK
from moe.parallel.exchange import Site, gather_exchange, local_exchange, sum_exchange
from moe.parallel.flow import Combine, Dispatch, Dispatched, Exchange
from moe.parallel.kernels import local_work
from moe.parallel.move import move_exchange
from moe.parallel.placement import Placement, placement_of, placement_tables
from moe.parallel.transport import Transport, transport_of
from moe.permute.added import as_added, operands_of
from moe.permute.config import MIN_TILE_ROWS
from moe.pipeline import MoEPipeline
from moe.tuning.tuned import tuned_pipeline

EXCHANGES = ("local", "sum", "gather", "move", "symmetric_sum", "symmetric_gather", "symmetric_move")


@dataclass(frozen=True)
class ParallelLayer:
    """A bf16 MoE layer whose experts lie on several ranks: route -> dispatch -> experts -> combine.

    Called as a pipeline is, by all ranks together and in the same order, each with its own tokens (with `sum`: all with the same)
    and the weights of its own experts. Any field is swapped with `dataclasses.replace`.
    """

    config: MoEConfig  # of the whole layer
    placement: Placement
    transport: Transport
    pipeline: MoEPipeline  # of this rank's experts: its `route`
    experts: Any  # what runs them, with the entries of a pipeline
    dispatch: Dispatch
    combine: Combine
    load: Tensor | None = (
        None  # [E] int64: slots that this rank's tokens chose, counted at each call; None: not counted
    )

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Global ids of the experts whose weights this rank passes, in this order."""
        return self.placement.experts_of_rank[self.transport.rank]

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """logits [T, E] and hidden_states [T, H] of this rank's tokens -> [T, H] bfloat16, in `output` where given.

        Args:
            w1, w2: of `local_experts`, as a pipeline of so many experts takes them; anything for a rank without experts.
            bias: [E], the same on all ranks.
            swiglu, w1_bias, w2_bias: of `local_experts`.
            routing_replay_out: [>=T, K] int16; receives the chosen global ids.
            added: as a pipeline takes it, of this rank's tokens: added here to what comes back, which rounds once more.

        Raises:
            TypeError, ValueError: as a pipeline, before anything is sent. Other ranks then wait for this one until their timeout.
            RuntimeError: a rank that is dead or late: names rank, collective and timeout.
        """
        tensors = (logits, hidden_states, w1, w2, swiglu, bias, output, routing_replay_out)
        call = LayerCall(*tensors, added=as_added(added), w1_bias=w1_bias, w2_bias=w2_bias)
        self.check(call)
        return self._run(self.pipeline.route(logits, bias, replay_out=routing_replay_out), call)

    def run_experts(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """The same from chosen experts: global ids [T, K], anything out of [0, E) for an unused slot."""
        tensors = (topk, hidden_states, w1, w2, swiglu, None, output)
        call = LayerCall(*tensors, is_chosen=True, added=as_added(added), w1_bias=w1_bias, w2_bias=w2_bias)
        self.check(call)
        return self._run(topk, call)

    def run_local(
        self,
        dispatched: Dispatched,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """This rank's experts over what was dispatched to it: what `combine` wants."""
        rows, output = dispatched.hidden_states, dispatched.output
        if not self.local_experts:
            empty = rows if dispatched.slots is None else rows[:0]
            return torch.zeros_like(empty) if output is None else output.zero_()
        numbers = {"swiglu": swiglu, "w1_bias": w1_bias, "w2_bias": w2_bias}
        if dispatched.slots is None:
            return self.experts.run_experts(dispatched.topk, rows, w1, w2, output=output, **numbers)
        found = self.experts.run_experts_unfinalized(dispatched.topk, rows, w1, w2, **numbers)
        return found.rows.index_select(0, found.row_of_slot.flatten().index_select(0, dispatched.slots))

    def _run(self, topk: TopK, call: LayerCall) -> Tensor:
        if self.load is not None:
            count_load(self.load, topk)
        dispatched = self.dispatch(call.hidden_states, topk)
        biases = {"w1_bias": call.w1_bias, "w2_bias": call.w2_bias}
        rows = self.run_local(dispatched, call.w1, call.w2, swiglu=call.swiglu, **biases)
        return with_added(self.combine(rows, dispatched, output=call.output), call.added)

    def wait(self, output: Tensor) -> Tensor:
        """The result of a call, once it is there: for GPUs, whose collectives are queued. The host waits, no longer than the group's timeout.

        Raises:
            TypeError: no tensor.
            RuntimeError: another rank is dead or late: names ranks and timeout. This process has lost its place among them: end it.
        """
        expect_type("output", output, Tensor, "pass what a call returned")
        self.transport.wait("the layer's result", output.device)
        return output

    def check(self, call: LayerCall) -> None:
        """Raise TypeError or ValueError unless the tensors of the call are what this rank passes."""
        if self.local_experts:
            check_call(self.pipeline.config, call)
        else:
            anything: Any = None
            call = call._replace(w1=anything, w2=anything, swiglu=None, w1_bias=None, w2_bias=None)
            check_call(self.pipeline.config, call, has_experts=False)


def with_added(output: Tensor, added: Added | None) -> Tensor:
    """`output` with what was added to it, in float32, rounded once."""
    if added is None:
        return output
    values, gate, scale = operands_of(added)
    assert values is not None
    factor = scale if gate is None else gate.float()[:, None]
    with torch.inference_mode():  # where the caller may have allocated it
        output.copy_(output.float() + values.float() * factor)
    return output


def build_layer(
    config: MoEConfig,
    group_or_mesh: Any,
    device: torch.device | str,
    *,
    exchange: str = "gather",
    experts_of_rank: Placement | Sequence[int] | Sequence[Sequence[int]] | None = None,
    max_tokens: int | None = None,
    is_rank_invariant: bool = False,
    counts_load: bool = False,
    layer: int = 0,
    memory: int = 0,
) -> ParallelLayer:
    """A layer over the ranks of a group. All ranks call it with the same arguments but for `device`.

    Args:
        config: of the whole layer, all experts local.
        group_or_mesh: a torch.distributed ProcessGroup, a DeviceMesh of one dimension, or None for the default group (one rank
            where there is none).
        device: where this rank's tensors lie.
        exchange: "local" (one rank), "sum" (every rank calls with the same tokens and gets all results), "gather" (every rank gets
            all tokens), "move" (a row goes to the ranks that need it); the last three as "symmetric_sum" and so on between GPUs that
            reach one another's memory. docs/parallel.md says which one when.
        experts_of_rank: a `Placement`; or each rank's ids; or how many neighbouring experts each rank has; None: as even as it
            goes, the first ranks one more.
        max_tokens: the most tokens that a rank brings to a call. With it the sizes of `gather` are fixed and nothing waits for the host;
            without it ranks may bring any number, and each call waits for the ranks' numbers once. Symmetric exchanges need it: it
            says how much memory they share.
        is_rank_invariant: with "move" or "local": the bits of one rank, whatever the number of ranks and the placement, on a GPU.
            One kind of kernel for every number of tokens and one row a slot back, so slower (docs/parallel.md).
        counts_load: count chosen slots by expert, on the device, in the layer's `load`.
        layer: the layer's number in its model: with copies of experts, layers spread tokens over them differently.
        memory: which of several memories a symmetric exchange uses. Layers that run one after another share one; those that are
            under way at once (`InHalves`) need different numbers.

    Raises:
        ValueError: an unknown exchange, a config of a slice, a placement for another number of ranks or experts, or an option that
            the exchange does not have.

    Example:
        >>> layer = build_layer(config, None, "cuda", exchange="gather", max_tokens=256)
        >>> output = layer(logits, tokens, w1, w2)  # this rank's tokens, and its experts' weights
    """
    device = torch.device(device)
    transport = transport_of(group_or_mesh)
    placement = placement_of(experts_of_rank, config.num_experts, transport.num_ranks)
    _expect_options(config, transport, exchange, max_tokens=max_tokens, is_rank_invariant=is_rank_invariant)
    local = local_config(config, len(placement.experts_of_rank[transport.rank]), is_rank_invariant=is_rank_invariant)
    experts = tuned_pipeline(local, device)
    pipeline = experts.at(1)  # its router and its last stage, whose results do not follow from tiles
    site = Site(transport, placement_tables(placement, device), local_work(device), layer)
    if exchange.startswith("symmetric"):
        halves = _symmetric_exchange_of(exchange, site, config, max_tokens or 0, device, memory)
    else:
        halves = _exchange_of(exchange, site, pipeline, max_tokens=max_tokens, is_rank_invariant=is_rank_invariant)
    load = torch.zeros(config.num_experts, dtype=torch.int64, device=device) if counts_load else None
    return ParallelLayer(config, placement, transport, pipeline, experts, halves.dispatch, halves.combine, load)


def _exchange_of(
    name: str, site: Site, pipeline: MoEPipeline, *, max_tokens: int | None, is_rank_invariant: bool
) -> Exchange:
    build: dict[str, Callable[[], Exchange]] = {
        "local": lambda: local_exchange(site),
        "sum": lambda: sum_exchange(site),
        "gather": lambda: gather_exchange(site, max_tokens),
        "move": lambda: move_exchange(
            site,
            pipeline.finalize,
            returns_slots=is_rank_invariant,
            weighs_rows=not pipeline.config.weighs_input,
        ),
    }
    return build[name]()


def _symmetric_exchange_of(
    name: str, site: Site, config: MoEConfig, max_tokens: int, device: torch.device, memory: int
) -> Exchange:
    # Here and not above: it needs Triton.
    from moe.parallel.symmetric import symmetric_gather_exchange, symmetric_sum_exchange

    if name == "symmetric_sum":
        return symmetric_sum_exchange(site, max_tokens, config.hidden_size, device, memory)
    return symmetric_gather_exchange(
        site, max_tokens, config.hidden_size, config.top_k, device, memory, selects=name == "symmetric_move"
    )


def local_config(config: MoEConfig, num_local_experts: int, *, is_rank_invariant: bool = False) -> MoEConfig:
    """The config of one rank's pipeline, whose expert ids are places in its weights.

    A rank without experts runs none; its config says one, since no pipeline has none.
    """
    num_local_experts = max(num_local_experts, 1)
    permute: dict[str, Any] = {"num_local_experts": num_local_experts, "local_expert_offset": 0}
    gemm: dict[str, Any] = {"num_experts": num_local_experts}
    stages: dict[str, Any] = {}
    if is_rank_invariant:  # as `MoEConfig.create(is_batch_invariant=True)`
        permute["tile_rows"] = config.permute.tile_rows or MIN_TILE_ROWS
        gemm["kernel"] = "swapped"
        stages["few_tokens"] = config.few_tokens.model_copy(update={"max_tokens": 0})
    stages |= {
        "permute": config.permute.model_copy(update=permute),
        "gemm1": config.gemm1.model_copy(update=gemm),
        "gemm2": config.gemm2.model_copy(update=gemm),
    }
    return config.model_copy(update=stages)


def count_load(load: Tensor, topk: TopK) -> None:
    """Add the slots that chose each expert to load [E] int64. On the device, without a wait; whole numbers, so in any order."""
    ids = topk.expert_ids.flatten().long()
    is_used = (ids >= 0) & (ids < load.shape[0])
    load.scatter_add_(0, ids.clamp(0, load.shape[0] - 1), is_used.long())


def _expect_options(
    config: MoEConfig, transport: Transport, exchange: str, *, max_tokens: int | None, is_rank_invariant: bool
) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected one of {', '.join(EXCHANGES)}, got {exchange!r}; name one")
    permute = config.permute
    if permute.num_local_experts != permute.num_experts:
        raise ValueError(
            f"config: expected all {permute.num_experts} experts, got a slice of {permute.num_local_experts}; leave "
            "local_expert_offset and num_local_experts out: experts_of_rank says which lie here"
        )
    if exchange == "local" and transport.num_ranks > 1:
        raise ValueError(
            f"exchange: expected one rank for 'local', got {transport.num_ranks}; use 'gather', 'sum' or 'move'"
        )
    if is_rank_invariant and exchange not in ("move", "local"):
        raise ValueError(
            f"is_rank_invariant: expected exchange 'move', got {exchange!r}, which rounds a partial sum a rank; use 'move'"
        )
    if max_tokens is None and exchange.startswith("symmetric"):
        raise ValueError(f"max_tokens: expected a number for {exchange!r}, got None; pass the most tokens of a rank")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}; pass the most tokens of a rank")
