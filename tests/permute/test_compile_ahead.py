"""Planning kernels compiled in other processes: theirs is what this one would have made, and nothing depends on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.permute import compile_ahead
from moe.permute.compile_ahead import CompilingAhead, PlanningJob
from moe.permute.config import PermuteConfig

pytest.importorskip("numba.cuda")
pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing")
CONFIG = PermuteConfig(num_experts=8, num_local_experts=8, top_k=2)
UNITS = (160, 32, 22)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "_num_cpus", lambda: 2)
    return tmp_path / "ptx"


def job(num_tokens: int, unit_size: tuple[int, int, int] | None = None, **changes: object) -> PlanningJob:
    fields = {"config": CONFIG, "uses_pdl": True, "capability": (9, 0)} | changes
    return PlanningJob(num_tokens=num_tokens, unit_size=unit_size, **fields)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be started; a command that ends at once is."""
    seen = []
    start = subprocess.Popen

    def started(command: list[str], **options: object) -> subprocess.Popen:
        seen.append(command)
        return start([sys.executable, "-c", ""])

    monkeypatch.setattr(subprocess, "Popen", started)
    return seen


def test_what_other_processes_compiled_is_what_this_one_would(folder: Path):
    jobs = [job(16), job(16, UNITS)]
    kernels = [kernel for one in jobs for kernel in one.missing()]
    assert len(kernels) == 2
    with CompilingAhead(jobs) as compiling:
        compiling.wait()
    assert [one.missing() for one in jobs] == [[], []]
    assert len(list(folder.iterdir())) == 2
    assert code_of(kernels[1].cached_ptx((9, 0))) == code_of(kernels[1].compile_ptx((9, 0)))


def code_of(ptx: str) -> list[str]:
    """Lines without the names in them: numba numbers the functions of a process."""
    lines = [line for line in ptx.splitlines() if "_Z" not in line and "cudapy" not in line]
    assert sum(line.strip().endswith(";") for line in lines) > 100
    return lines


def test_each_kernel_is_compiled_once_in_no_more_processes_than_processors(commands):
    loads = [16, 20, 24, 5000, 6000, 100_000]
    with CompilingAhead([job(num_tokens, size) for num_tokens in loads for size in (None, UNITS)]) as compiling:
        compiling.wait()
    assert len(commands) == 2
    texts = [text for command in commands for text in command[3:]]
    # 16 to 24 tokens take one kernel, 5000 and 6000 another, 100,000 two; with units, and without.
    assert len(texts) == 6
    assert {PlanningJob.model_validate_json(text).num_tokens for text in texts} == {16, 5000, 100_000}


@pytest.mark.parametrize(
    "jobs",
    [
        [],
        [job(16)],  # one: this process makes it as fast
        [job(0), job(0, UNITS)],
        [job(16, config=PermuteConfig(num_experts=4096, num_local_experts=4096, top_k=2)) for _ in range(2)],
    ],
    ids=["none", "one", "no_tokens", "too_many_experts"],
)
def test_no_process_is_started_where_none_helps(jobs, commands):
    with CompilingAhead(jobs) as compiling:
        compiling.wait()
    assert not commands


def test_nothing_is_compiled_that_is_on_disk(commands, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe.runtime.numba_launch.is_cached", lambda built_for: True)
    with CompilingAhead([job(16), job(16, UNITS)]):
        pass
    assert not commands


def test_kernels_that_differ_in_their_warps_are_two(commands):
    config = PermuteConfig(num_experts=128, num_local_experts=128, top_k=8)
    with CompilingAhead([job(32, config=config), job(128, config=config)]):
        assert len(commands) == 2


def test_no_process_is_started_where_nothing_can_be_kept(commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "file"))
    with CompilingAhead([job(16), job(16, UNITS)]):
        assert not commands


def test_a_path_may_be_any_object(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    with CompilingAhead([job(16), job(16, UNITS)]) as compiling:
        assert len(compiling._processes) == 2


@pytest.mark.parametrize("executable", [None, "", "/nonexistent/python", "/usr/sbin/uwsgi", sys.executable])
def test_processes_that_fail_are_of_no_consequence(
    executable: str | None, monkeypatch: pytest.MonkeyPatch, folder: Path
):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(PlanningJob, "model_dump_json", lambda self: "no job")
    with CompilingAhead([job(16), job(16, UNITS)]) as compiling:
        compiling.wait()
    assert not list(folder.iterdir())


def test_processes_end_with_the_block(monkeypatch: pytest.MonkeyPatch):
    start, started = subprocess.Popen, []

    def sleeping(command: list[str], **options: object) -> subprocess.Popen:
        started.append(start([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    with CompilingAhead([job(16), job(16, UNITS)]):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def test_a_process_that_hangs_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_ahead, "TIMEOUT_S", 0.01)
    test_processes_end_with_the_block(monkeypatch)
    with CompilingAhead([job(16), job(16, UNITS)]) as compiling:
        compiling.wait()
        assert not compiling._processes
