"""The exchanges over shared memory: between simulated ranks in Triton's interpreter, and between GPUs where there are some."""

from __future__ import annotations

import pytest
import torch
from parallel.layers import EXPERTS, Whole, layer_over, make_whole, moved_to, run_rank, run_rank_with_all_tokens
from torch import Tensor

from moe.parallel import Placement
from moe.parallel.kernels import local_work
from moe.parallel.placement import placement_of, placement_tables
from moe.parallel.simulated import simulate
from moe.parallel.transport import Transport

COPIES = Placement(EXPERTS, ((0, 1, 2, 7), (3, 4, 5, 0), (6, 7, 0, 3)))
EXCHANGES = ["symmetric_gather", "symmetric_move"]


def results(whole: Whole, calls: int, **options: object) -> list[Tensor]:
    """Of each call, the results of all ranks, one after another."""

    def one_rank(transport: Transport) -> list[Tensor]:
        layer = layer_over(transport, whole, **options)
        return [run_rank(whole, layer) for _ in range(calls)]

    of_ranks = simulate(len(whole.tokens_of_rank), one_rank)
    return [torch.cat(outputs) for outputs in zip(*of_ranks)]


@pytest.mark.parametrize(
    ("placement", "tokens"),
    [(None, (5, 5, 5)), ([5, 0, 3], (7, 0, 4)), (COPIES, (18, 0, 1)), (COPIES, (0, 0, 0))],
    ids=["even", "a_rank_without_experts", "copies", "no_tokens"],
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_shared_memory_gives_the_bits_of_the_plain_exchange(exchange, placement, tokens, triton_device):
    whole = moved_to(make_whole(tokens), triton_device)
    options = {"experts_of_rank": placement, "max_tokens": max(tokens) + 1}
    # Pads as `gather` does, so its kernels see the same rows.
    (wanted,) = results(whole, 1, exchange="gather", **options)
    whole.expect(wanted)
    # Twice: the second call finds what the first one left.
    for output in results(whole, 2, exchange=exchange, **options):
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shared_memory_gives_every_rank_all_sums(num_ranks, num_tokens, triton_device):
    whole = moved_to(make_whole([num_tokens]), triton_device)

    def one_rank(transport: Transport) -> list[Tensor]:
        layer = layer_over(transport, whole, exchange="symmetric_sum", max_tokens=19)
        return [run_rank_with_all_tokens(whole, layer) for _ in range(2)]

    def plain(transport: Transport) -> Tensor:
        return run_rank_with_all_tokens(whole, layer_over(transport, whole, exchange="sum"))

    (wanted, *_) = simulate(num_ranks, plain)
    whole.expect(wanted)
    for outputs in simulate(num_ranks, one_rank):
        assert all(torch.equal(output, wanted) for output in outputs)


def test_rows_are_pushed_to_the_ranks_that_need_them_and_to_no_other(triton_device):
    from moe.parallel.exchange import Site
    from moe.parallel.symmetric import push_rows, regions, shared_bytes

    whole = moved_to(make_whole((4, 6, 3)), triton_device)
    max_tokens, hidden_size = 6, whole.hidden_states.shape[1]
    tables = placement_tables(placement_of(COPIES, EXPERTS, 3), triton_device)
    sizes = [((3 * max_tokens, hidden_size), torch.bfloat16), ((3, 2, max_tokens, 3), torch.int32)]

    def one_rank(transport: Transport) -> tuple[Tensor, Tensor]:
        site = Site(transport, tables, local_work(triton_device), layer=4)
        shared = transport.share("test", shared_bytes(sizes), triton_device)
        arrived, packed = regions(shared, sizes)
        arrived.tensor.fill_(float("nan"))
        shared.barrier()
        topk, x = whole.tokens_at(transport.rank)
        push_rows(x, topk, site, arrived, packed, max_tokens, selects=True)
        shared.barrier()
        rank_of_slot, _ = site.work.place_slots(topk, tables, layer=4, source_rank=transport.rank)
        return arrived.tensor.clone(), rank_of_slot

    ranks = simulate(3, one_rank)
    for me, (arrived, _) in enumerate(ranks):
        for source, (_, rank_of_slot) in enumerate(ranks):
            _, x = whole.tokens_at(source)
            is_needed = (rank_of_slot == me).any(1)
            there = arrived[source * max_tokens : source * max_tokens + len(x)]
            assert torch.equal(there[is_needed], x[is_needed])
            assert there[~is_needed].isnan().all()


def test_a_cpu_has_no_symmetric_memory():
    from moe.parallel.transport import _symmetric_memory

    with pytest.raises(ValueError, match="device: expected a GPU for symmetric memory, got cpu; use 'gather'"):
        _symmetric_memory(None, 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="max_tokens: expected a number for 'symmetric_sum'"):
        simulate(1, lambda transport: layer_over(transport, make_whole([2]), exchange="symmetric_sum"))
