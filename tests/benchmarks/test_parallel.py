"""The local work of one rank of eight, on one device: index building, packing and summing around deepseek-v3's experts. No speed is asserted.

`extra_info` has the device's time, the bytes that a piece reads and writes, and their time at 4.2 TB/s. For `push_rows` and `pull_sum` the memory
of all eight ranks lies on this device.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from moe.cli.beside import BUDGET_S
from moe.cli.layer import random_logits
from moe.cli.machine import pick_device
from moe.flow import TopK
from moe.parallel.exchange import Site
from moe.parallel.kernels import local_work
from moe.parallel.placement import even_placement, placement_tables
from moe.parallel.transport import SharedMemory, alone
from moe.tuning.measure import measure_us

NUM_RANKS, EXPERTS, TOP_K = 8, 256, 8
MEMORY_BYTES_PER_S = 4.2e12
TOKENS = (128, 1024, 4096)
PLAIN = ("pack_slots", "place_slots", "place_all_slots", "sum_ranks", "plan_copies", "pack_rows", "number_slots")
SYMMETRIC = ("push_rows", "push_selected_rows", "pull_sum", "pull_selected_sum")

Piece = tuple[Callable[[], object], int]  # and the bytes that it reads and writes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_smoke = metafunc.config.getoption("--benchmark-disable") or not torch.cuda.is_available()
    metafunc.parametrize("num_tokens", (5,) if is_smoke else TOKENS, ids="T{}".format)
    metafunc.parametrize("piece", PLAIN + (SYMMETRIC if torch.cuda.is_available() else ()))


def test_time_of_local_work(piece: str, num_tokens: int, benchmark: BenchmarkFixture):
    device = pick_device("auto")
    hidden_size = 7168 if device.type == "cuda" else 64
    call, num_bytes = pieces(num_tokens, hidden_size, device)[piece]()
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    if benchmark.disabled:
        return
    us = measure_us(call, device=device, budget_s=BUDGET_S[device.type]).median_us
    bytes_us = 1e6 * num_bytes / MEMORY_BYTES_PER_S
    benchmark.group = f"local work of one rank of {NUM_RANKS}, T{num_tokens}"
    benchmark.extra_info |= {"piece": piece, "num_tokens": num_tokens, "device_us": us}
    benchmark.extra_info |= {"num_bytes": num_bytes, "bytes_us": bytes_us, "within_bar": us <= 1.05 * bytes_us + 3.0}
    print(f"\n{piece} T{num_tokens}: {us:.1f} us, bytes alone {bytes_us:.1f}")


def pieces(num_tokens: int, hidden_size: int, device: torch.device) -> dict[str, Callable[[], Piece]]:
    work = local_work(device)
    tables = placement_tables(even_placement(EXPERTS, NUM_RANKS), device)
    generator = torch.Generator(device=device).manual_seed(0)
    values, ids = random_logits(num_tokens, EXPERTS, "uniform", generator).topk(TOP_K, dim=1)
    topk = TopK(ids.int().contiguous(), values.softmax(1).contiguous())
    x = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    slot_bytes = topk.expert_ids.nbytes
    rank_of_slot, local = work.place_slots(topk, tables, layer=0)
    copy, slot, counts = work.plan_copies(rank_of_slot, NUM_RANKS)
    num_rows = int(counts[:, 0].sum())

    def place_all() -> Piece:
        packed = torch.stack([work.pack_slots(topk, num_tokens)] * NUM_RANKS)
        ids, weights = packed.unbind(1)
        slots = TopK(ids, weights.view(torch.float32))
        return partial(work.place_slots, slots, tables, layer=0, only_rank=3), 4 * NUM_RANKS * slot_bytes

    def sum_all() -> Piece:
        partial_sums = torch.stack([x] * NUM_RANKS)
        return partial(work.sum_ranks, partial_sums, num_tokens), (NUM_RANKS + 1) * x.nbytes

    def pack() -> Piece:
        call = partial(work.pack_rows, x, rank_of_slot, local, copy, counts, num_rows)
        return call, x.nbytes + num_rows * (x[0].nbytes + 8 * TOP_K) + 3 * slot_bytes + 2 * copy.nbytes

    found: dict[str, Callable[[], Piece]] = {
        "pack_slots": lambda: (partial(work.pack_slots, topk, num_tokens), 4 * slot_bytes),
        "place_slots": lambda: (partial(work.place_slots, topk, tables, layer=0), 3 * slot_bytes),
        "place_all_slots": place_all,
        "sum_ranks": sum_all,
        "plan_copies": lambda: (partial(work.plan_copies, rank_of_slot, NUM_RANKS), 2 * slot_bytes + copy.nbytes),
        "pack_rows": pack,
        "number_slots": lambda: (partial(work.number_slots, rank_of_slot, slot, counts), 3 * slot_bytes),
    }
    if device.type == "cuda":
        found |= symmetric_pieces(topk, x, num_rows, Site(alone(), tables, work))
    return found


def symmetric_pieces(topk: TopK, x: Tensor, num_rows: int, site: Site) -> dict[str, Callable[[], Piece]]:
    from moe.parallel.symmetric import pull_sum, push_rows, regions, shared_bytes

    num_tokens, hidden_size = x.shape
    sizes = [((NUM_RANKS, num_tokens, hidden_size), torch.bfloat16), ((NUM_RANKS, 2, num_tokens, TOP_K), torch.int32)]
    one = shared_bytes(sizes)
    memory = torch.zeros(NUM_RANKS * one, dtype=torch.uint8, device=x.device)
    addresses = tuple(memory.data_ptr() + rank * one for rank in range(NUM_RANKS))
    arrived, packed = regions(SharedMemory(memory, addresses, lambda: None), sizes)
    slot_bytes, output = topk.expert_ids.nbytes, torch.empty_like(x)

    def push(copies: int, *, selects: bool) -> Piece:
        call = partial(push_rows, x, topk, site, arrived, packed, num_tokens, selects=selects)
        return call, x.nbytes + copies * x[0].nbytes + 2 * slot_bytes * (1 + NUM_RANKS)

    def pull(copies: int, sent: TopK | None) -> Piece:
        return partial(pull_sum, output, num_tokens, site, arrived, 0, sent), x.nbytes + copies * x[0].nbytes

    return {
        "push_rows": lambda: push(NUM_RANKS * num_tokens, selects=False),
        "push_selected_rows": lambda: push(num_rows, selects=True),
        "pull_sum": lambda: pull(NUM_RANKS * num_tokens, None),
        "pull_selected_sum": lambda: pull(num_rows, topk),
    }
