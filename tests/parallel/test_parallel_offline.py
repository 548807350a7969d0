"""What the compiler makes of an exchange's kernels, on GPUs that this machine need not have."""

from __future__ import annotations

import os

import pytest
import torch
from emulation.offline_driver import OfflineGpu, offline_gpu

from moe.flow import TopK
from moe.parallel.exchange import Site
from moe.parallel.kernels import REFERENCES, kernels
from moe.parallel.placement import even_placement, placement_tables
from moe.parallel.transport import SharedMemory, Transport, alone

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HIDDEN, TOP_K, EXPERTS = 7168, 8, 256


def topk_of(num_tokens: int, top_k: int = TOP_K, dtype: torch.dtype = torch.float32) -> TopK:
    shape = (num_tokens, top_k)
    return TopK(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=dtype))


def launches_of_local_work(num_tokens: int, num_ranks: int, layer: int, arch: int) -> OfflineGpu:
    """Dispatch and combine of a rank, plain exchanges, with sizes that Triton makes constants of where they are 1."""
    work = kernels()
    tables = placement_tables(even_placement(EXPERTS, num_ranks, EXPERTS if num_ranks > 1 else 0), "cpu")
    topk, x = topk_of(num_tokens, dtype=torch.bfloat16), torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16)
    with offline_gpu(arch) as gpu:
        packed = work.pack_slots(topk, num_tokens)
        ids, weights = torch.stack([packed] * num_ranks).unbind(1)
        work.place_slots(TopK(ids, weights.view(torch.float32)), tables, layer=layer, only_rank=1 % num_ranks)
        work.place_slots(topk, tables, layer=layer, source_rank=num_ranks - 1)
        ranks = torch.zeros_like(topk.expert_ids)
        copy, slot, counts = REFERENCES.plan_copies(ranks, num_ranks)
        work.plan_copies(ranks, num_ranks)
        work.pack_rows(x, ranks, topk, copy, counts, num_tokens)
        work.number_slots(ranks, slot, counts)
        work.sum_ranks(x[None].expand(num_ranks, -1, -1).contiguous(), num_tokens)
    return gpu


def launches_of_symmetric(num_tokens: int, rank: int, num_ranks: int, arch: int, *, selects: bool) -> OfflineGpu:
    from moe.parallel.symmetric import pull_sum, push_rows, regions, shared_bytes

    transport = Transport(rank, num_ranks, *[alone().all_gather] * 3, share=alone().share, wait=alone().wait)  # type: ignore[arg-type]
    tables = placement_tables(even_placement(EXPERTS, num_ranks, EXPERTS), "cpu")
    site = Site(transport, tables, REFERENCES, layer=rank)
    rows = ((num_ranks * num_tokens, HIDDEN), torch.bfloat16)
    sizes = [rows, ((num_ranks, 2, num_tokens, TOP_K), torch.int32), rows]
    memory = torch.zeros(shared_bytes(sizes), dtype=torch.uint8)
    shared = SharedMemory(memory, tuple([memory.data_ptr()] * num_ranks), lambda: None)
    arrived, packed, partial = regions(shared, sizes)
    topk, x = topk_of(num_tokens), torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16)
    with offline_gpu(arch) as gpu:
        push_rows(x, topk, site, arrived, packed, num_tokens, selects=selects)
        pull_sum(x, num_tokens, site, partial, rank * num_tokens, topk if selects else None)
        pull_sum(None, num_tokens, site, partial, 1, sums=arrived)
    return gpu


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("num_tokens", "num_ranks", "layer"), [(1, 1, 1), (1, 8, 0), (64, 8, 1)])
def test_local_work_compiles_without_spilling(num_tokens, num_ranks, layer, arch):
    launches = launches_of_local_work(num_tokens, num_ranks, layer, arch).launches
    names = ["pack_slots", "place_slots", "place_slots", "plan_copies", "pack_rows", "number_slots", "sum_ranks"]
    assert [launch.name for launch in launches] == [f"{name}_kernel" for name in names]
    for launch in launches:
        assert launch.report.spill_bytes == 0, launch.name
        assert launch.report.fits


def test_rows_are_read_and_written_sixteen_bytes_at_once():
    for launch in launches_of_local_work(64, 8, 1, 90).launches:
        if store := {"pack_rows_kernel": "st.global.cs.v4", "sum_ranks_kernel": "st.global.v4"}.get(launch.name):
            assert launch.report.count("ld.global.v4") >= 1, launch.name
            assert launch.report.count(store) >= 1, launch.name


@pytest.mark.parametrize("selects", [False, True], ids=["gather", "move"])
@pytest.mark.parametrize(("num_tokens", "rank", "num_ranks"), [(1, 0, 2), (1, 1, 2), (40, 1, 8)])
def test_kernels_over_shared_memory_move_sixteen_bytes_at_once(num_tokens, rank, num_ranks, selects):
    push, pull, pull_and_push = launches_of_symmetric(num_tokens, rank, num_ranks, 90, selects=selects).launches
    for launch in (push, pull, pull_and_push):
        assert launch.report.spill_bytes == 0, launch.name
    assert push.report.count("st.global.cs.v4") == num_ranks
    assert pull.report.count("ld.global.v4") == num_ranks
    assert pull_and_push.report.count("st.global.v4") == num_ranks
