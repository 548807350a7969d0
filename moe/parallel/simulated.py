"""N ranks as threads of one process, on one device: the exchanges without processes, for tests and for one GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe.parallel.transport import SharedMemory, Transport

Result = TypeVar("Result")


def simulate(num_ranks: int, work: Callable[[Transport], Result], *, timeout_s: float = 60.0) -> list[Result]:
    """Run `work` once a rank, in a thread each; results by rank. The first error of a rank is raised.

    All ranks use the device's default stream, so what one rank leaves in memory the next finds.

    Raises:
        threading.BrokenBarrierError: ranks that do not call the same collectives within `timeout_s`.
    """
    meeting = _Meeting(num_ranks, threading.Barrier(num_ranks, timeout=timeout_s))
    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = [pool.submit(meeting.run, rank, work) for rank in range(num_ranks)]
    errors = [error for rank in ranks if (error := rank.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [rank.result() for rank in ranks]


@dataclass(frozen=True)
class _Meeting:
    num_ranks: int
    barrier: threading.Barrier
    brought: dict[int, Any] = field(default_factory=dict)
    turn: threading.Lock = field(
        default_factory=threading.Lock
    )  # of the one rank that runs: Triton's interpreter takes no two

    def run(self, rank: int, work: Callable[[Transport], Result]) -> Result:
        transport = Transport(
            rank,
            self.num_ranks,
            lambda what, tensor: self.all_gather(rank, tensor),
            lambda what, rows, num_sent=None, num_received=None: self.all_to_all(rank, rows, num_sent, num_received),
            lambda what, tensor: tensor.copy_(self.exchange(rank, tensor.clone())[0]),
            lambda what, num_bytes, device: self.share(rank, num_bytes, device),
            lambda what, device: None,
        )
        try:
            with torch.inference_mode(), self.turn:
                return work(transport)
        except BaseException:
            self.barrier.abort()
            raise

    def exchange(self, rank: int, brings: Any) -> list[Any]:
        """What every rank brings, by rank."""
        self.brought[rank] = brings
        self.wait()
        all_brought = [self.brought[other] for other in range(self.num_ranks)]
        self.wait()
        return all_brought

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def meet(self, rank: int, keeps: object) -> None:
        self.exchange(rank, keeps)

    def share(self, rank: int, num_bytes: int, device: torch.device) -> SharedMemory:
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        # All ranks' memory lives as long as any rank's barrier.
        everyone = self.exchange(rank, memory)
        addresses = tuple(other.data_ptr() for other in everyone)
        return SharedMemory(memory, addresses, lambda: self.meet(rank, everyone))

    def all_gather(self, rank: int, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        return torch.cat(self.exchange(rank, tensor))

    def all_to_all(
        self, rank: int, rows: Tensor, num_sent: Sequence[int] | None, num_received: Sequence[int] | None
    ) -> Tensor:
        assert rows.is_contiguous()
        sizes = [rows.shape[0] // self.num_ranks] * self.num_ranks if num_sent is None else list(num_sent)
        parts = [split[rank] for split in self.exchange(rank, rows.split(sizes))]
        if num_received is not None:
            assert [len(part) for part in parts] == list(num_received)
        return torch.cat(parts)
