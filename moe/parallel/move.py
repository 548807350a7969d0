"""The exchange `move`: each token's row goes once to each rank that computes a slot of it, and to no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe.flow import Permutation, TopK
from moe.parallel.exchange import Site, expect_no_capture
from moe.parallel.flow import Dispatched, Exchange, WayBack
from moe.parallel.transport import to_host


def move_exchange(
    site: Site, finalize: Callable[..., Tensor], *, returns_slots: bool, weighs_rows: bool = True
) -> Exchange:
    """Sizes follow from the routing: `dispatch` exchanges counts and waits for them once. No other call waits for the host.

    Args:
        finalize: a pipeline's last stage: sums what comes back.
        returns_slots: the row of every slot comes back, unweighted, and is weighted and summed k ascending where the token
            lives, as one rank does it. Else weights go with the row, and one weighted sum a row comes back: fewer rows.
        weighs_rows: False where weights have gone into the input of experts: rows that come back count once.
    """
    transport, work = site.transport, site.work

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        expect_no_capture(hidden_states.device, "move: the host waits for the ranks' counts")
        num_tokens = hidden_states.shape[0]
        rank_of_slot, local = work.place_slots(topk, site.tables, layer=site.layer, source_rank=transport.rank)
        copy, slot, counts = work.plan_copies(rank_of_slot, transport.num_ranks)
        received = transport.all_to_all("counts of rows", counts)
        (sent, slots_sent), (got, slots_got) = (
            tuple(map(tuple, pair))
            for pair in to_host(transport, "counts of rows", torch.stack((counts.T, received.T)))
        )
        rows, slots, row_of_copy = work.pack_rows(hidden_states, rank_of_slot, local, copy, counts, sum(sent))
        rows = transport.all_to_all("hidden_states", rows, sent, got)
        slots = transport.all_to_all("expert ids and weights", slots, sent, got)
        ids, weights = slots[:, 0].contiguous(), slots[:, 1].contiguous().view(torch.float32)
        arrived = Dispatched(rows, TopK(ids, weights), num_tokens)
        if not returns_slots:
            return replace(arrived, way_back=WayBack(got, sent, row_of_copy, None))
        row_of_slot = work.number_slots(rank_of_slot, slot, counts)
        is_here = (ids >= 0).flatten()
        here = torch.nonzero_static(is_here, size=sum(slots_got)).flatten()
        way_back = WayBack(slots_got, slots_sent, row_of_slot, topk.weights if weighs_rows else None)
        return replace(arrived, slots=here, way_back=way_back)

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        back = dispatched.way_back
        assert back is not None
        returned = transport.all_to_all("results", rows, back.num_sent, back.num_returned)
        weights = back.weights
        if weights is None:
            weights = torch.ones(back.row_of_choice.shape, dtype=torch.float32, device=rows.device)
        choices = TopK(back.row_of_choice, weights)
        return finalize(returned, choices, _only_rows(back.row_of_choice, returned), output=output)

    return Exchange(dispatch, combine)


def _only_rows(row_of_choice: Tensor, rows: Tensor) -> Permutation:
    """A permutation of which finalize reads `row_of_slot` and the number of rows."""
    none = row_of_choice.new_empty(0)
    return Permutation(
        row_of_slot=row_of_choice,
        token_of_row=row_of_choice.new_empty(rows.shape[0]),
        expert_of_tile=none,
        row_limit_of_tile=none,
        num_rows=none,
        num_tiles=none,
        tile_rows=1,
    )
