"""The kernels of an exchange's local work, against torch."""

from __future__ import annotations

import pytest
import torch

from moe.flow import TopK
from moe.parallel.kernels import REFERENCES, LocalWork
from moe.parallel.placement import Placement, even_placement, placement_tables

PLACEMENTS = {
    "one_rank": even_placement(13, 1),
    "uneven": Placement(13, (tuple(range(5)), (), tuple(range(5, 13)))),
    "copies": even_placement(13, 5, 20),
}


def kernels() -> LocalWork:
    from moe.parallel.kernels import kernels

    return kernels()


def random_topk(num_rows: int, top_k: int, dtype: torch.dtype, device: torch.device, *, first: int = -2) -> TopK:
    generator = torch.Generator().manual_seed(num_rows + top_k)
    ids = torch.randint(first, 15, (num_rows, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(num_rows, top_k, generator=generator).to(dtype)
    return TopK(ids.to(device), weights.to(device))


@pytest.mark.parametrize("only_rank", [None, 0])
@pytest.mark.parametrize("num_rows", [0, 1, 37, 130])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_slots_are_placed_as_the_reference_places_them(placement, num_rows, only_rank, triton_device, poisoned_memory):
    tables = placement_tables(placement, triton_device)
    topk = random_topk(num_rows, 3, torch.bfloat16, triton_device)
    options = {"layer": 5, "source_rank": 2, "only_rank": only_rank}
    rank, local = kernels().place_slots(topk, tables, **options)
    wanted_rank, wanted = REFERENCES.place_slots(topk, tables, **options)
    assert torch.equal(local.expert_ids, wanted.expert_ids)
    assert torch.equal(local.weights, wanted.weights)
    assert (rank is None) == (wanted_rank is None)
    assert rank is None or torch.equal(rank, wanted_rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_tokens", "padded"), [(0, 3), (5, 5), (70, 97), (0, 0)])
def test_packed_slots_are_placed_where_they_lie(num_tokens, padded, dtype, triton_device, poisoned_memory):
    topk = random_topk(num_tokens, 4, dtype, triton_device)
    packed = kernels().pack_slots(topk, padded)
    assert torch.equal(packed, REFERENCES.pack_slots(topk, padded))
    gathered = torch.stack([packed, packed.flip(1).contiguous()])
    ids, weights = gathered.unbind(1)
    slots = TopK(ids, weights.view(torch.float32))
    tables = placement_tables(PLACEMENTS["copies"], triton_device)
    _, local = kernels().place_slots(slots, tables, layer=0, only_rank=1)
    _, wanted = REFERENCES.place_slots(slots, tables, layer=0, only_rank=1)
    assert torch.equal(local.expert_ids, wanted.expert_ids)
    assert torch.equal(local.weights, wanted.weights)
    assert local.expert_ids.is_contiguous()


@pytest.mark.parametrize(("num_ranks", "rows", "num_tokens", "hidden"), [(1, 3, 3, 40), (4, 5, 2, 264), (9, 70, 65, 1032), (3, 4, 0, 8)])  # fmt: skip
def test_partial_sums_are_joined_in_rank_order(num_ranks, rows, num_tokens, hidden, triton_device, poisoned_memory):
    generator = torch.Generator().manual_seed(hidden)
    partial = torch.randn(num_ranks, rows, hidden, generator=generator).bfloat16().to(triton_device)
    partial[:, num_tokens:] = float("nan")
    output = kernels().sum_ranks(partial, num_tokens)
    assert torch.equal(output, REFERENCES.sum_ranks(partial, num_tokens))
    given = torch.empty_like(output)
    assert kernels().sum_ranks(partial, num_tokens, output=given) is given
    assert torch.equal(given, output)


@pytest.mark.parametrize(
    ("num_ranks", "top_k", "num_tokens"),
    [(1, 1, 0), (1, 1, 5), (2, 8, 1), (2, 8, 1100), (2, 8, 2600), (5, 3, 30), (40, 6, 30)],
)
def test_rows_and_slots_get_the_numbers_of_the_reference(num_tokens, num_ranks, top_k, triton_device, poisoned_memory):
    generator = torch.Generator().manual_seed(num_tokens + top_k)
    ranks = torch.randint(-1, num_ranks, (num_tokens, top_k), generator=generator, dtype=torch.int32).to(triton_device)
    copy, slot, counts = kernels().plan_copies(ranks, num_ranks)
    for found, wanted in zip((copy, slot, counts), REFERENCES.plan_copies(ranks, num_ranks)):
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype
    assert torch.equal(kernels().number_slots(ranks, slot, counts), REFERENCES.number_slots(ranks, slot, counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_ranks", "hidden"), [(0, 2, 8), (1, 3, 8), (9, 2, 1032), (23, 7, 136)], ids=str
)
def test_rows_are_packed_by_rank(num_tokens, num_ranks, hidden, dtype, triton_device, poisoned_memory):
    topk = random_topk(num_tokens, 3, dtype, triton_device, first=0)
    generator = torch.Generator().manual_seed(num_tokens)
    ranks = torch.randint(-1, num_ranks, (num_tokens, 3), generator=generator, dtype=torch.int32).to(triton_device)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16().to(triton_device)
    copy, _, counts = REFERENCES.plan_copies(ranks, num_ranks)
    num_rows = int(counts[:, 0].sum())
    found = kernels().pack_rows(x, ranks, topk, copy, counts, num_rows)
    for tensor, wanted in zip(found, REFERENCES.pack_rows(x, ranks, topk, copy, counts, num_rows)):
        assert torch.equal(tensor, wanted)
