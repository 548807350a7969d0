"""Planning kernels compiled before they are needed, each in a process of its own: numba compiles in Python, 2 to 4 s a kernel.

A process is this module, with a job as JSON; it leaves its PTX where `moe.kept_ptx` finds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from moe.flow import UnitSize
from moe.frozen import FrozenConfig
from moe.launch import NumbaKernel
from moe.permute.config import PermuteConfig

MAX_PROCESSES = 8
TIMEOUT_S = 120.0


class PlanningJob(FrozenConfig):
    """A load that is going to be planned for, and the GPU that will do it."""

    config: PermuteConfig
    num_tokens: int
    unit_size: tuple[int, int, int] | None  # max_rows, multiple and max_group of the UnitSize
    uses_pdl: bool
    capability: tuple[int, int]

    def missing(self) -> list[NumbaKernel]:
        """Kernels that would have to be compiled."""
        from moe.permute.block_plan import kernels_for, takes  # needs numba, which `import moe.tuning` does not

        num_slots = self.num_tokens * self.config.top_k
        if not num_slots or not takes(self.config):
            return []
        size = None if self.unit_size is None else UnitSize(*self.unit_size)
        kernels = kernels_for(self.config, num_slots, size, self.uses_pdl)
        return [kernel for kernel in kernels if not kernel.is_kept(self.capability)]


class CompilingAhead:
    """Processes that compile what jobs need; `wait` for them, or leave the `with` block, which ends them."""

    def __init__(self, jobs: Iterable[PlanningJob]) -> None:
        missing: dict[tuple[str | None, ...], PlanningJob] = {}
        for job in jobs:
            if kernels := job.missing():
                missing.setdefault(tuple(kernel.built_for for kernel in kernels), job)
        lists = _share_out([job.model_dump_json() for job in missing.values()])
        self._processes = [process for texts in lists if (process := _start(texts)) is not None]

    def __enter__(self) -> CompilingAhead:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def wait(self) -> None:
        """Until all are done. What a process could not compile is compiled where it is needed, as without it."""
        for process in self._processes:
            try:
                process.wait(TIMEOUT_S)
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
    # A user may have put this package on sys.path by hand.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "moe.permute.compile_ahead", *texts],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:  # no executable, as where Python is embedded
        return None


def main(texts: list[str]) -> None:
    for text in texts:
        job = PlanningJob.model_validate_json(text)
        for kernel in job.missing():
            kernel.kept_ptx(job.capability)


if __name__ == "__main__":
    main(sys.argv[1:])
