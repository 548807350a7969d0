"""Exchanges over symmetric memory: kernels write rows into other ranks' memory and sum out of it. No host wait, no NVLink multicast.

Two barriers a call order everything. What a rank pushes is there for all after the first; partial sums are there after the second. A rank
pushes again only after its own last sum, and writes partial sums again only after the next first barrier, which no rank passes before all have
summed. So memory is used again, by the next call or the next layer, without a third.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe.flow import TopK
from moe.parallel.exchange import Site, expect_within
from moe.parallel.flow import Dispatched, Exchange
from moe.parallel.placement import PlacementTables
from moe.parallel.pull_sum_kernel import pull_sum_kernel
from moe.parallel.push_rows_kernel import push_rows_kernel
from moe.parallel.transport import SharedMemory
from moe.runtime.triton_launch import TritonKernel

BLOCK_H, SMALL_BLOCK_H = 1024, 256
FEW_TOKENS = 16  # up to here blocks of one warp, to spread a row over more of the GPU
COLUMNS_A_WARP = 256  # 16 bytes a lane
ALIGNMENT_BYTES = 256
PULLS_ALL_TOKENS = 16  # of `sum`: up to here each rank sums all tokens, a barrier less for more bytes


@dataclass(frozen=True)
class Region:
    """A tensor at the same place of every rank's shared memory."""

    tensor: Tensor
    addresses: Tensor  # [N] int64, on the device


def regions(shared: SharedMemory, sizes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Region]:
    """Tensors one after another in shared memory, aligned."""
    found, first = [], 0
    for shape, dtype in sizes:
        num_bytes = _num_bytes(shape, dtype)
        tensor = shared.memory[first : first + num_bytes].view(dtype).view(shape)
        addresses = torch.tensor([address + first for address in shared.addresses], dtype=torch.int64)
        found.append(Region(tensor, addresses.to(tensor.device)))
        first += _aligned(num_bytes)
    return found


def shared_bytes(sizes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(_aligned(_num_bytes(shape, dtype)) for shape, dtype in sizes)


def symmetric_gather_exchange(
    site: Site, max_tokens: int, hidden_size: int, top_k: int, device: torch.device, memory: int, *, selects: bool
) -> Exchange:
    """`gather` and, where it `selects`, `move` over symmetric memory.

    Every rank has room for max_tokens rows of every rank: num_ranks * max_tokens * hidden_size * 4 bytes, shared by all layers.
    With `selects` a row goes only to the ranks that compute a slot of it; what is in other rows' places is old, and not read.
    """
    transport = site.transport
    num_ranks, rank = transport.num_ranks, transport.rank
    rows = ((num_ranks * max_tokens, hidden_size), torch.bfloat16)
    sizes = [rows, ((num_ranks, 2, max_tokens, top_k), torch.int32), rows]
    shared = transport.share(f"gather {sizes} {memory}", shared_bytes(sizes), device)
    arrived, packed, partial = regions(shared, sizes)

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        expect_within(hidden_states.shape[0], max_tokens)
        push_rows(hidden_states, topk, site, arrived, packed, max_tokens, selects=selects)
        shared.barrier()
        ids, weights = packed.tensor.unbind(1)
        local = site.place_here(TopK(ids, weights.view(torch.float32)))
        return Dispatched(arrived.tensor, local, hidden_states.shape[0], output=partial.tensor, sent=topk)

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        if rows is not partial.tensor:
            partial.tensor.copy_(rows)
        shared.barrier()
        num_tokens = dispatched.num_tokens
        output = rows.new_empty(num_tokens, hidden_size) if output is None else output
        pull_sum(output, num_tokens, site, partial, rank * max_tokens, dispatched.sent if selects else None)
        return output

    return Exchange(dispatch, combine)


def symmetric_sum_exchange(
    site: Site, max_tokens: int, hidden_size: int, device: torch.device, memory: int
) -> Exchange:
    """`sum` over symmetric memory: with two ranks or few tokens each sums all of them, else each its share, which it pushes to all."""
    transport = site.transport
    num_ranks, rank = transport.num_ranks, transport.rank
    rows = ((max_tokens, hidden_size), torch.bfloat16)
    shared = transport.share(f"sum {rows} {memory}", shared_bytes([rows, rows]), device)
    partial, sums = regions(shared, [rows, rows])

    def dispatch(hidden_states: Tensor, topk: TopK) -> Dispatched:
        num_tokens = hidden_states.shape[0]
        expect_within(num_tokens, max_tokens)
        local = site.place_here(topk)
        shared.barrier()  # all have summed what the last call left
        return Dispatched(hidden_states, local, num_tokens, output=partial.tensor[:num_tokens])

    def combine(rows: Tensor, dispatched: Dispatched, *, output: Tensor | None = None) -> Tensor:
        num_tokens = dispatched.num_tokens
        if rows is not dispatched.output:
            partial.tensor[:num_tokens].copy_(rows)
        shared.barrier()
        output = torch.empty_like(rows) if output is None else output
        if num_ranks <= 2 or num_tokens <= PULLS_ALL_TOKENS:
            pull_sum(output, num_tokens, site, partial, 0)
            return output
        share = -(-num_tokens // num_ranks)
        first = min(rank * share, num_tokens)
        pull_sum(None, min(share, num_tokens - first), site, partial, first, sums=sums)
        shared.barrier()
        return output.copy_(sums.tensor[:num_tokens])

    return Exchange(dispatch, combine)


def push_rows(
    hidden_states: Tensor, topk: TopK, site: Site, arrived: Region, packed: Region, max_tokens: int, *, selects: bool
) -> None:
    """Rows to place rank * max_tokens and on of all ranks' `arrived`; ids and weights' bits, padded, to their `packed`[rank]."""
    num_tokens, hidden_size = hidden_states.shape
    top_k = topk.expert_ids.shape[1]
    block_h = _block_h(num_tokens, hidden_size)
    num_programs = num_tokens * -(-hidden_size // block_h) + -(-max_tokens * top_k // block_h)
    kernel = _kernel_of(push_rows_kernel, _shape_of(site.tables, top_k, hidden_size, selects=selects), block_h)
    kernel.launch(
        (num_programs, 1, 1),
        hidden_states,
        topk.expert_ids,
        topk.weights,
        site.tables.num_copies,
        site.tables.rank_of_copy,
        arrived.addresses,
        packed.addresses,
        numbers=(num_tokens, max_tokens, site.transport.rank, site.layer),
    )


def pull_sum(
    output: Tensor | None,
    num_rows: int,
    site: Site,
    partial: Region,
    first_row: int,
    topk: TopK | None = None,
    *,
    sums: Region | None = None,
) -> None:
    """Rows first_row and on of all ranks' `partial`, summed in float32 in rank order: into `output`, or (None) into all ranks' `sums`.

    Args:
        topk: what was pushed with `selects`: only the ranks that it went to have a sum.
    """
    if not num_rows:
        return
    hidden_size = partial.tensor.shape[-1]
    block_h = _block_h(num_rows, hidden_size)
    top_k = 1 if topk is None else topk.expert_ids.shape[1]
    kernel = _kernel_of(pull_sum_kernel, _shape_of(site.tables, top_k, hidden_size, selects=topk is not None), block_h)
    tensors = (
        partial.addresses,
        site.tables.num_copies,
        site.tables.rank_of_copy,
        output,
        None if topk is None else topk.expert_ids,
        None if sums is None else sums.addresses,
    )
    numbers = (first_row, site.transport.rank, site.layer)
    kernel.launch((num_rows * -(-hidden_size // block_h), 1, 1), *tensors, numbers=numbers)


Shape = tuple[int, int, int, bool, int, int]


def _shape_of(tables: PlacementTables, top_k: int, hidden_size: int, *, selects: bool) -> Shape:
    return tables.num_ranks, tables.num_experts, tables.max_copies, selects, top_k, hidden_size


@functools.cache
def _kernel_of(kernel: object, shape: Shape, block_h: int) -> TritonKernel:
    num_ranks, num_experts, max_copies, selects, top_k, hidden_size = shape
    return TritonKernel(
        kernel,
        NUM_RANKS=num_ranks,
        NUM_EXPERTS=num_experts,
        MAX_COPIES=max_copies,
        SELECTS=selects,
        TOP_K=top_k,
        TOP_K_PAD=triton.next_power_of_2(top_k),
        HIDDEN=hidden_size,
        BLOCK_H=block_h,
        num_warps=max(block_h // COLUMNS_A_WARP, 1),
    )


def _block_h(num_tokens: int, hidden_size: int) -> int:
    return min(SMALL_BLOCK_H if num_tokens <= FEW_TOKENS else BLOCK_H, triton.next_power_of_2(hidden_size))


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return functools.reduce(lambda product, size: product * size, shape, dtype.itemsize)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
