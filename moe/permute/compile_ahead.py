"""Planning kernels compiled before they are needed, each in a process of its own: numba compiles in Python, 2 to 4 s a kernel.

A process runs `main` with its jobs as JSON, and leaves its PTX where `moe.runtime.ptx_cache` finds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable

import torch

from moe.base_config import FrozenConfig
from moe.flow import UnitSize
from moe.permute.config import PermuteConfig
from moe.permute.kernels import planner_of
from moe.runtime.cache_folder import cache_folder
from moe.runtime.numba_launch import NumbaKernel
from moe.runtime.ptx_cache import can_keep

MAX_PROCESSES = 8
TIMEOUT_S = 60.0
_PROGRAM = "import sys; from moe.permute.compile_ahead import main; main(sys.argv[1:])"


class PlanningJob(FrozenConfig):
    """A load that is going to be planned for, and the GPU that will do it."""

    config: PermuteConfig
    num_tokens: int
    unit_size: tuple[int, int, int] | None  # max_rows, multiple and max_group of the UnitSize
    uses_pdl: bool
    capability: tuple[int, int]

    def missing(self) -> list[NumbaKernel]:
        """Kernels that would have to be compiled."""
        num_slots = self.num_tokens * self.config.top_k
        if not num_slots or planner_of(self.config, torch.device("cuda")).name != "numba":
            return []
        from moe.permute.numba_plan import kernels_for  # needs numba, which `import moe.tuning` does not

        size = None if self.unit_size is None else UnitSize(*self.unit_size)
        kernels = kernels_for(self.config, num_slots, size, self.uses_pdl)
        return [kernel for kernel in kernels if not kernel.is_cached(self.capability)]


class CompilingAhead:
    """Processes that compile what jobs need; `wait` for them, or leave the `with` block, which ends them.

    Where they cannot be started, or fail, kernels are compiled where they are needed, as without them.
    """

    def __init__(self, jobs: Iterable[PlanningJob] = ()) -> None:
        missing: dict[tuple[NumbaKernel, ...], PlanningJob] = {}
        for job in jobs:
            if kernels := job.missing():
                missing.setdefault(tuple(kernels), job)
        lists = _share_out([job.model_dump_json() for job in missing.values()]) if missing and can_keep() else []
        self._processes = [process for texts in lists if (process := _start(texts)) is not None]

    def __enter__(self) -> CompilingAhead:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def wait(self) -> None:
        """Until all are done, or TIMEOUT_S from now on."""
        deadline = time.monotonic() + TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []


def _share_out(texts: list[str]) -> list[list[str]]:
    """One list a process. None for a single job: importing what it needs takes as long as the job."""
    num_processes = min(len(texts), _num_cpus(), MAX_PROCESSES)
    return [texts[index::num_processes] for index in range(num_processes)] if num_processes > 1 else []


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(texts: list[str]) -> subprocess.Popen[bytes] | None:
    if not _is_python(sys.executable):
        return None
    # This process may have been told of its paths by hand, and have a folder of its own.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in sys.path if path),
        "MOE_CACHE_DIR": str(cache_folder()),
    }
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *texts],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None


def _is_python(executable: str | None) -> bool:
    """Not so where Python is embedded in another program, or frozen into one."""
    return bool(executable) and not getattr(sys, "frozen", False) and "python" in os.path.basename(executable or "")


def main(texts: list[str]) -> None:
    for text in texts:
        job = PlanningJob.model_validate_json(text)
        for kernel in job.missing():
            kernel.cached_ptx(job.capability)
