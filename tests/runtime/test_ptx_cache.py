"""PTX on disk: read where it is right, made again where it is not, and never another kernel's."""

import os
from pathlib import Path

import pytest
import torch

import moe
from moe.runtime import numba_launch
from moe.runtime import ptx_cache as module
from moe.runtime.cache_folder import warn_not_kept
from moe.runtime.ptx_cache import cached_ptx

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
PTX = "//\n.visible .entry kernel()\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_toolchain", lambda: "numba 1")
    return tmp_path / "cache" / "ptx"


class Maker:
    def __init__(self, ptx: str = PTX):
        self.ptx = ptx
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        return self.ptx


def test_it_is_made_once_and_read_from_then_on(folder: Path):
    make = Maker()
    assert [cached_ptx("plan 128", make) for _ in range(3)] == [PTX] * 3
    assert make.num_calls == 1
    assert len(list(folder.iterdir())) == 1, "no temporary file is left"


@pytest.mark.parametrize("what", ["built_for", "sources", "toolchain"])
def test_it_is_made_again_where_anything_else_went_into_it(what: str, monkeypatch: pytest.MonkeyPatch, folder: Path):
    cached_ptx("plan 128", Maker("old"))
    if what == "sources":
        monkeypatch.setattr(module, "_sources", lambda: "changed")
    if what == "toolchain":
        monkeypatch.setattr(module, "_toolchain", lambda: "numba 2")
    assert cached_ptx("plan 256" if what == "built_for" else "plan 128", Maker("new")) == "new"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("fault", ["empty", "cut", "changed", "binary", "folder"])
def test_a_broken_file_is_made_again(fault: str, folder: Path):
    cached_ptx("plan 128", Maker())
    (file,) = folder.iterdir()
    text = file.read_bytes()
    broken = {"empty": b"", "cut": text[:-3], "changed": text.replace(b"kernel", b"kerneI"), "binary": b"\xff\x00" * 9}
    if fault == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(broken[fault])
    make = Maker()
    assert cached_ptx("plan 128", make) == PTX
    assert make.num_calls == 1
    if fault != "folder":
        assert file.read_bytes() == text


def test_nothing_is_kept_where_there_is_no_folder_to_write_to(folder: Path):
    folder.parent.write_text("a file")
    make = Maker()
    warn_not_kept.cache_clear()
    with pytest.warns(
        UserWarning, match="cannot be written .*each process makes the PTX of its kernels again"
    ) as caught:
        assert [cached_ptx("plan 128", make) for _ in range(2)] == [PTX] * 2
    assert len(caught) == 1
    assert make.num_calls == 2
    assert folder.parent.read_text() == "a file"


def test_nothing_is_kept_where_the_compilers_cannot_be_told(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setattr(module, "_toolchain", lambda: None)
    assert cached_ptx("plan 128", Maker()) == PTX
    assert not folder.exists()


def test_what_fails_to_compile_leaves_no_file(folder: Path):
    with pytest.raises(ValueError, match="no such type"):
        cached_ptx("plan 128", lambda: (_ for _ in ()).throw(ValueError("no such type")))
    assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of two files, as this process began with it."""
    package = tmp_path / "moe"
    for folder, name, text in (("runtime", "ptx_cache.py", ""), ("permute", "plan_kernel.py", "one")):
        (package / folder).mkdir(parents=True)
        (package / folder / name).write_text(text)
    monkeypatch.setattr(module, "__file__", str(package / "runtime" / "ptx_cache.py"))
    monkeypatch.setattr(module, "_FILES_AT_IMPORT", module._files())
    monkeypatch.setattr(module, "_sources", module._sources.__wrapped__)
    return package


def test_the_files_that_count_are_those_of_all_stages():
    files = {file.relative_to(Path(moe.__file__).parent).as_posix() for file in module._package_files()}
    assert {"__init__.py", "permute/numba_plan_kernel.py", "routing/topk_kernel.py", "runtime/ptx_cache.py"} <= files


def test_the_hash_of_the_sources_follows_every_file(package: Path):
    hashes = [module._sources()]
    (package / "permute" / "plan_kernel.py").write_text("two")
    hashes.append(module._sources())
    (package / "permute" / "plan_kernel.py").rename(package / "permute" / "other.py")
    hashes.append(module._sources())
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("change", ["edit", "new", "gone"])
def test_nothing_is_kept_once_the_files_changed_under_the_process(change: str, package: Path, folder: Path):
    """What is in memory is of the old files, and would be found by processes of the new ones."""
    cached_ptx("plan 128", Maker("old"))
    file = package / "permute" / "plan_kernel.py"
    if change == "gone":
        file.unlink()
    else:
        (file if change == "edit" else file.with_name("more.py")).write_text("two, longer")
    make = Maker("still old")
    assert [cached_ptx("plan 128", make), cached_ptx("plan 256", make)] == ["still old"] * 2
    assert not module.is_cached("plan 128")
    assert not module.can_keep()
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_kept_where_the_files_change_during_the_compilation(package: Path, folder: Path):
    def make() -> str:
        (package / "permute" / "plan_kernel.py").write_text("two, longer")
        return PTX

    assert cached_ptx("plan 128", make) == PTX
    assert not folder.exists()


def test_files_that_are_no_python_are_of_no_consequence(package: Path):
    (package / ".#numba_launch.py").symlink_to("nobody@nowhere.1")
    (package / "._launch.py").write_bytes(b"\x00\x05\xff")
    assert cached_ptx("plan 128", Maker()) == PTX
    assert module.is_cached("plan 128")


def test_a_file_that_cannot_be_found_keeps_nothing(package: Path, folder: Path):
    (package / "numba_launch.py").symlink_to("nowhere")
    assert cached_ptx("plan 128", Maker()) == PTX
    assert not folder.exists()


def test_the_oldest_files_make_room(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setattr(module, "MAX_FILES", 3)
    for number in range(5):
        cached_ptx(f"plan {number}", Maker())
        for age, file in enumerate(sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)):
            os.utime(file, (1000 + age, 1000 + age))
    assert [module.is_cached(f"plan {number}") for number in range(5)] == [False, False, True, True, True]


@pytest.mark.skipif(IS_SIMULATED, reason="the simulator compiles nothing")
def test_a_kernel_of_the_package_is_loaded_from_disk(monkeypatch: pytest.MonkeyPatch, folder: Path):
    from moe.permute.numba_plan import count_kernel_of

    loaded: list[str] = []
    monkeypatch.setattr(numba_launch, "_loaded", loaded.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for _ in range(2):  # two processes: nothing in memory
        count_kernel_of.__wrapped__(32, 8)._load(0)
        monkeypatch.setattr(numba_launch, "_compiler", lambda: pytest.fail("compiled again"))
    assert loaded[0] == loaded[1]
    assert ".target sm_90" in loaded[0]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(IS_SIMULATED, reason="the simulator compiles nothing")
def test_no_two_kernels_of_the_package_share_a_file():
    from moe.gemm.swapped.tile import SWAPPED_UNITS
    from moe.gemm.wide.tile import WIDE_UNITS
    from moe.permute.numba_block import Totals
    from moe.permute.numba_plan import count_kernel_of, plan_kernel_of
    from moe.routing.config import RoutingConfig
    from moe.routing.topk import kernel_of

    plain = RoutingConfig(num_experts=64, top_k=4, method="Renormalize")
    scaled = RoutingConfig(num_experts=64, top_k=4, method="DeepSeekV3", routed_scaling_factor=2.5)
    other_scale = RoutingConfig(num_experts=64, top_k=4, method="DeepSeekV3", routed_scaling_factor=2.50001)
    grouped = RoutingConfig(num_experts=64, top_k=4, method="DeepSeekV3", n_group=8, topk_group=4)
    kernels = [
        *(kernel_of(config, torch.float32, None, False) for config in (plain, scaled, other_scale, grouped)),
        kernel_of(plain, torch.bfloat16, None, False),
        kernel_of(plain, torch.float32, None, True),
        kernel_of(plain, torch.float32, None, False, uses_pdl=True),
        *(kernel_of(scaled, torch.float32, dtype, False) for dtype in (torch.float32, torch.bfloat16)),
        *(
            count_kernel_of(bins, warps, uses_pdl=pdl)
            for bins in (32, 64)
            for warps in (8, 32)
            for pdl in (False, True)
        ),
        *(
            plan_kernel_of(bins, warps, top_k, totals, units, uses_pdl=pdl)
            for bins in (32, 64)
            for warps in (8, 32)
            for top_k in (1, 8)
            for totals in Totals
            for units in (None, SWAPPED_UNITS, WIDE_UNITS)
            for pdl in (False, True)
        ),
    ]
    names = {(kernel.built_for, kernel.parameters, kernel.threads_per_block) for kernel in kernels}
    assert len(names) == len(kernels)
    assert None not in {kernel.built_for for kernel in kernels}
