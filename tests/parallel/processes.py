"""Ranks as processes over gloo: started once for all cases, since each start costs seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

DEADLINE_S = 120.0
GROUP_TIMEOUT = timedelta(seconds=60)


class RankDied(BaseException):
    """Raised in a case by a rank that is to end there, without a word to the others."""


Case = Callable[[Any], None]  # takes the world's group


def run_cases(
    num_ranks: int, cases: Mapping[str, Case], folder: Path, *, backend: str = "gloo", preload: tuple[str, ...] = ()
) -> dict[str, str]:
    """Run every case on all ranks, in order; by name, what went wrong on any rank ("" for nothing).

    Args:
        cases: module-level functions. The last ones may leave the group unfit for others.
        backend: "nccl" gives each rank a GPU.
        preload: modules that the processes share, imported once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "moe.parallel", *preload])
    store = folder / "store"
    processes = [
        context.Process(
            target=_rank, args=(rank, num_ranks, backend, str(store), dict(cases), str(folder)), daemon=True
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        if process.is_alive():
            process.kill()
    return {name: "\n".join(_report(folder, name, rank) for rank in range(num_ranks)).strip() for name in cases}


def _rank(rank: int, num_ranks: int, backend: str, store: str, cases: dict[str, Case], folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=GROUP_TIMEOUT
    )
    for name, case in cases.items():
        has_died = False
        try:
            with torch.inference_mode():
                case(dist.group.WORLD)
            found = ""
        except RankDied:
            found, has_died = "", True
        except Exception:
            found = f"rank {rank}: {traceback.format_exc()}"
        (Path(folder) / f"{name}.{rank}").write_text(found)
        if has_died:
            break
    os._exit(0)  # a group that a case broke would wait for its ranks


def _report(folder: Path, name: str, rank: int) -> str:
    file = folder / f"{name}.{rank}"
    return file.read_text() if file.exists() else f"rank {rank}: never came to the end of {name}"
