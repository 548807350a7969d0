"""The collectives that exchanges are made of, over torch.distributed: every tensor contiguous, every error with a name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPIN_S, POLL_S = 2e-3, 5e-5  # a wait for a GPU asks again at once for so long, and then so often
REPORT_S = 2.0  # after a failure, how long ranks wait for one another's word that they live


@dataclass(frozen=True)
class SharedMemory:
    """As many bytes on every rank, which kernels of all ranks write and read."""

    memory: Tensor  # [num_bytes] uint8, this rank's
    addresses: tuple[int, ...]  # of every rank's, as this rank's kernels reach them
    barrier: Callable[[], None]  # what any rank wrote before it, all ranks see after it; in stream order


@dataclass(frozen=True)
class Transport:
    """This rank's place among the others, and what it does with them. `what` names the tensors in errors."""

    rank: int
    num_ranks: int
    all_gather: Callable[[str, Tensor], Tensor]  # (what, [n, ..]) -> [num_ranks * n, ..], by rank
    all_to_all: Callable[..., Tensor]  # (what, rows, num_sent=None, num_received=None) -> rows of all ranks, by rank
    broadcast: Callable[[str, Tensor], Tensor]  # (what, tensor) -> rank 0's, written into it too
    share: Callable[
        [str, int, torch.device], SharedMemory
    ]  # (what, num_bytes a rank, device); the same memory for the same `what`
    wait: Callable[
        [str, torch.device], None
    ]  # until what is queued on the device is done, or the group's timeout is over
    group: Any = None  # the torch.distributed group underneath; None: no processes


def alone() -> Transport:
    """One rank, which keeps what it has."""
    return Transport(
        0,
        1,
        all_gather=lambda what, tensor: tensor,
        all_to_all=lambda what, rows, num_sent=None, num_received=None: rows,
        broadcast=lambda what, tensor: tensor,
        share=_own_memory,
        wait=lambda what, device: None,
    )


def to_host(transport: Transport, what: str, tensor: Tensor) -> list[Any]:
    """A tensor's numbers, once the collectives before it are done. The host waits, and no longer than the group's timeout.

    Raises:
        RuntimeError: another rank is dead or late.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist()
    numbers = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    numbers.copy_(tensor, non_blocking=True)
    transport.wait(what, tensor.device)
    torch.cuda.current_stream(tensor.device).synchronize()
    return numbers.tolist()


def _own_memory(what: str, num_bytes: int, device: torch.device) -> SharedMemory:
    memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return SharedMemory(memory, (memory.data_ptr(),), lambda: None)


def transport_of(group_or_mesh: Any) -> Transport:
    """The collectives of a process group, a DeviceMesh of one dimension, or (None) of the default group; `alone` without one.

    Raises:
        ValueError: a mesh of several dimensions.
        TypeError: something else.
    """
    import torch.distributed as dist

    if isinstance(group_or_mesh, Transport):
        return group_or_mesh
    if group_or_mesh is None:
        if not (dist.is_available() and dist.is_initialized()):
            return alone()
        group_or_mesh = dist.group.WORLD
    if hasattr(group_or_mesh, "get_group"):
        if group_or_mesh.ndim != 1:
            raise ValueError(
                f"group_or_mesh: expected a mesh of one dimension, got {group_or_mesh.ndim}; pass mesh['name of the experts' axis']"
            )
        group_or_mesh = group_or_mesh.get_group()
    if not isinstance(group_or_mesh, dist.ProcessGroup):
        raise TypeError(
            f"group_or_mesh: expected a ProcessGroup, a DeviceMesh or None, got {type(group_or_mesh).__name__}; "
            "torch.distributed.new_group makes one"
        )
    collectives = _Collectives(group_or_mesh)
    return Transport(
        dist.get_rank(group_or_mesh),
        dist.get_world_size(group_or_mesh),
        collectives.all_gather,
        collectives.all_to_all,
        collectives.broadcast,
        collectives.share,
        collectives.wait,
        group_or_mesh,
    )


@dataclass(frozen=True)
class _Collectives:
    group: Any

    def all_gather(self, what: str, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        gathered = tensor.new_empty((self.group.size() * tensor.shape[0], *tensor.shape[1:]))
        assert tensor.is_contiguous()
        assert gathered.is_contiguous()
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._run("all_gather", what, tensor, lambda: gather(gathered, tensor, group=self.group))
        return gathered

    def all_to_all(
        self, what: str, rows: Tensor, num_sent: Sequence[int] | None = None, num_received: Sequence[int] | None = None
    ) -> Tensor:
        import torch.distributed as dist

        num_rows = rows.shape[0] if num_received is None else sum(num_received)
        received = rows.new_empty((num_rows, *rows.shape[1:]))
        assert rows.is_contiguous()
        assert received.is_contiguous()
        sizes_received, sizes_sent = (None if counts is None else list(counts) for counts in (num_received, num_sent))
        self._run(
            "all_to_all",
            what,
            rows,
            lambda: dist.all_to_all_single(received, rows, sizes_received, sizes_sent, group=self.group),
        )
        return received

    def broadcast(self, what: str, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        assert tensor.is_contiguous()
        first = dist.get_global_rank(self.group, 0)
        self._run("broadcast", what, tensor, lambda: dist.broadcast(tensor, first, group=self.group))
        return tensor

    def share(self, what: str, num_bytes: int, device: torch.device) -> SharedMemory:
        """Symmetric memory of torch, kept for all layers of the group that cut it in the same way: they run one after another."""
        if self.group.size() == 1:
            return _own_memory(what, num_bytes, device)
        key = (self.group.group_name, what, device)
        if key not in _shared:
            _shared[key] = _symmetric_memory(self.group, num_bytes, device)
        return _shared[key]

    def wait(self, what: str, device: torch.device) -> None:
        """Collectives of GPUs are queued, so that a rank which never comes shows here, and not where they were started."""
        if device.type != "cuda":
            return
        done = torch.cuda.current_stream(device).record_event()
        begin, limit = time.monotonic(), _timeout_s(self.group, device)
        try:
            while not done.query():
                seconds = time.monotonic() - begin
                if limit is not None and seconds > limit:
                    raise RuntimeError(
                        "its GPU still waits; end the process, which has lost its place among the others"
                    )
                if seconds > SPIN_S:
                    time.sleep(POLL_S)
        except RuntimeError as error:  # a CUDA error too, as of the barrier of symmetric memory
            raise self._failure("wait for", what, device, time.monotonic() - begin, error) from error

    def _run(self, collective: str, what: str, tensor: Tensor, start: Callable[[], object]) -> None:
        """Start it; a failure says who, what and how long."""
        begin = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13, about a name that 2.11 has alone
                start()
        except RuntimeError as error:
            seconds = time.monotonic() - begin
            raise self._failure(f"{collective} of", what, tensor.device, seconds, error) from error

    def _failure(
        self, action: str, what: str, device: torch.device, seconds: float, error: RuntimeError
    ) -> RuntimeError:
        silent = _silent_ranks(self.group)
        return RuntimeError(
            f"{action} {what}: rank {self.group.rank()} of {self.group.size()} gave up after {seconds:.1f} s "
            f"(timeout of the group: {_timeout_text(self.group, device)}); {silent}; {error}"
        )


_shared: dict[tuple[str, str, torch.device], SharedMemory] = {}


def _symmetric_memory(group: Any, num_bytes: int, device: torch.device) -> SharedMemory:
    """Raises RuntimeError where the group's GPUs do not reach one another's memory."""
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU for symmetric memory, got {device}; use 'gather', 'sum' or 'move'")
    import torch.distributed._symmetric_memory as symmetric

    try:
        memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory, group.group_name)
    except RuntimeError as error:
        raise RuntimeError(
            f"symmetric memory: rank {group.rank()} of {group.size()} expected GPUs that reach one another's memory (one host, NVLink), "
            f"got: {error}; use 'gather', 'sum' or 'move'"
        ) from error
    timeout_ms = int(1000 * (_timeout_s(group, device) or 0))
    return SharedMemory(memory, tuple(handle.buffer_ptrs), lambda: handle.barrier(channel=0, timeout_ms=timeout_ms))


def _silent_ranks(group: Any) -> str:
    """Which ranks do not say, within two seconds, that they failed too: dead, or late."""
    import torch.distributed as dist

    try:
        store = dist.distributed_c10d._get_process_group_store(group)
        store.set(f"moe-gave-up-{group.rank()}", "1")
        silent = [rank for rank in range(group.size()) if rank != group.rank()]
        end = time.monotonic() + REPORT_S
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([f"moe-gave-up-{rank}"])]
            time.sleep(0.05)
    except (RuntimeError, AttributeError, KeyError):
        return "no word of the other ranks: their store is gone"
    return f"dead or late: rank {', '.join(map(str, silent))}" if silent else "every rank gave up"


def _timeout_text(group: Any, device: torch.device) -> str:
    seconds = _timeout_s(group, device)
    return "torch's default" if seconds is None else f"{seconds:g} s"


def _timeout_s(group: Any, device: torch.device) -> float | None:
    try:
        return group._get_backend(device).options._timeout.total_seconds()
    except (RuntimeError, AttributeError):
        return None
