"""The numbers that `move` gives rows and slots, against a list that is built row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.flow import TopK
from moe.parallel.reference import number_slots_reference, pack_rows_reference, plan_copies_reference

PROBLEMS = st.integers(1, 5).flatmap(
    lambda num_ranks: st.tuples(
        st.just(num_ranks),
        st.integers(1, 4).flatmap(
            lambda top_k: st.lists(
                st.lists(st.integers(-1, num_ranks - 1), min_size=top_k, max_size=top_k), min_size=1, max_size=9
            )
        ),
    )
)


@settings(max_examples=150, deadline=None)
@given(PROBLEMS)
def test_rows_go_by_rank_and_token_and_come_back_by_rank_token_and_choice(problem):
    num_ranks, ranks = problem
    rank_of_slot = torch.tensor(ranks, dtype=torch.int32)
    num_tokens, top_k = rank_of_slot.shape
    ids = torch.arange(num_tokens * top_k, dtype=torch.int32).view(num_tokens, top_k)
    local = TopK(torch.where(rank_of_slot >= 0, ids, -1), ids.float() / 8)
    x = torch.arange(num_tokens).bfloat16()[:, None].repeat(1, 2)

    sent = [(rank, token) for rank in range(num_ranks) for token in range(num_tokens) if rank in ranks[token]]
    back = [(rank, token, choice) for rank, token in sent for choice in range(top_k) if ranks[token][choice] == rank]

    copy, slot, counts = plan_copies_reference(rank_of_slot, num_ranks)
    assert counts.tolist() == [
        [sum(row[0] == rank for row in sent), sum(row[0] == rank for row in back)] for rank in range(num_ranks)
    ]
    rows, slots, row_of_copy = pack_rows_reference(x, rank_of_slot, local, copy, counts, len(sent))
    assert rows[:, 0].tolist() == [token for _, token in sent]
    for row, (rank, token) in enumerate(sent):
        assert row_of_copy[token, rank] == row
        wanted = [ids[token, k].item() if ranks[token][k] == rank else -1 for k in range(top_k)]
        assert slots[row, 0].tolist() == wanted
        assert torch.equal(slots[row, 1].view(torch.float32), local.weights[token])
    assert (row_of_copy >= 0).sum() == len(sent)
    row_of_slot = number_slots_reference(rank_of_slot, slot, counts)
    for row, (_, token, choice) in enumerate(back):
        assert row_of_slot[token, choice] == row
    assert (row_of_slot >= 0).sum() == len(back)
