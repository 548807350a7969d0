"""Exchanges of fixed sizes: `local` (one rank), `sum` (all ranks have all tokens) and `gather` (all ranks get all tokens)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.flow import TopK
from moe.parallel.flow import Dispatched, Exchange
from moe.parallel.kernels import LocalWork
from moe.parallel.placement import PlacementTables
from moe.parallel.transport import Transport, to_host


@dataclass(frozen=True)
class Site:
    """What every exchange knows: this rank, where experts lie, and who does the local work."""

    transport: Transport
    tables: PlacementTables
    work: LocalWork
    layer: int = 0

    def place_here(self, topk: TopK) -> TopK:
        """Local ids of the slots that this rank computes, -1 for others'. [R, K], or [N, M, K]: of M tokens a rank."""
        _, local = self.work.place_slots(topk, self.tables, layer=self.layer, only_rank=self.transport.rank)
        return local


def local_exchange(site: Site) -> Exchange:
    """One rank: nothing moves."""

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        return Dispatched(hidden_states, site.place_here(topk), hidden_states.shape[0])

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        return rows if output is None else output.copy_(rows)

    return Exchange(dispatch, combine)


def sum_exchange(site: Site) -> Exchange:
    """Every rank calls with the same tokens, computes its experts' part, and gets the whole sum.

    A rank sums its share of the tokens over ranks, then all gather the shares: an all-reduce whose order is the ranks'. Nothing
    waits for the host.
    """
    num_ranks = site.transport.num_ranks

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        num_tokens = hidden_states.shape[0]
        # Rows past the last token make shares equal; nobody reads what is in them.
        partial = hidden_states.new_empty(_share(num_tokens, num_ranks) * num_ranks, hidden_states.shape[1])
        return Dispatched(hidden_states, site.place_here(topk), num_tokens, output=partial[:num_tokens])

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        num_tokens, hidden_size = rows.shape
        share = _share(num_tokens, num_ranks)
        if not share:
            return rows if output is None else output
        partial = dispatched.output
        assert partial is not None
        if rows is not partial:
            partial.copy_(rows)
        padded = partial.as_strided((share * num_ranks, hidden_size), (hidden_size, 1))  # all that `dispatch` allocated
        shares = site.transport.all_to_all("partial sums", padded).view(num_ranks, share, hidden_size)
        total = site.transport.all_gather("sums", site.work.sum_ranks(shares, share))[:num_tokens]
        return total if output is None else output.copy_(total)

    return Exchange(dispatch, combine)


def gather_exchange(site: Site, max_tokens: int | None) -> Exchange:
    """Every rank gets all ranks' tokens, computes its experts' part of them, and sends each rank the sums of its tokens.

    Args:
        max_tokens: what ranks pad to, so that sizes are fixed and nothing waits for the host. None: ranks tell one another how
            many tokens they have, at each call, and the host waits for it.
    """
    transport = site.transport

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        num_tokens, hidden_size = hidden_states.shape
        padded = _most_tokens(transport, num_tokens, hidden_states.device) if max_tokens is None else max_tokens
        expect_within(num_tokens, padded)
        packed = transport.all_gather("expert ids and weights", site.work.pack_slots(topk, padded))
        rows = hidden_states
        if padded > num_tokens:
            rows = hidden_states.new_empty(padded, hidden_size)
            rows[:num_tokens] = hidden_states
        gathered = transport.all_gather("hidden_states", rows)
        top_k = packed.shape[-1]
        ids, weights = packed.view(transport.num_ranks, 2, padded, top_k).unbind(1)
        return Dispatched(gathered, site.place_here(TopK(ids, weights.view(torch.float32))), num_tokens)

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        num_rows, hidden_size = rows.shape
        partial = transport.all_to_all("partial sums", rows)
        partial = partial.view(transport.num_ranks, num_rows // transport.num_ranks, hidden_size)
        return site.work.sum_ranks(partial, dispatched.num_tokens, output=output)

    return Exchange(dispatch, combine)


def expect_within(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise ValueError(
            f"hidden_states: expected at most max_tokens={max_tokens} tokens, got {num_tokens}; build the layer with more"
        )


def expect_no_capture(device: torch.device, why: str) -> None:
    """Raise where a CUDA graph is being captured: the host cannot wait then."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{why}, which a CUDA graph cannot hold; build the layer with max_tokens and another exchange"
        )


def _most_tokens(transport: Transport, num_tokens: int, device: torch.device) -> int:
    """The most tokens that a rank has: one exchange of a number, for which the host waits."""
    expect_no_capture(device, "max_tokens: None makes the host wait for the ranks' numbers of tokens")
    counts = transport.all_gather("numbers of tokens", torch.tensor([num_tokens], device=device))
    return max(to_host(transport, "numbers of tokens", counts))


def _share(num_tokens: int, num_ranks: int) -> int:
    return -(-num_tokens // num_ranks)
