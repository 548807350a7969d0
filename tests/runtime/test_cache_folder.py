"""Where files are kept, and that nobody else's are read in their place."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe.runtime import cache_folder as module
from moe.runtime.cache_folder import cache_folder, can_write, file_lock, make_folder, replace_file, warn_not_kept


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("MOE_CACHE_DIR", "~/tables")
    assert cache_folder() == Path("/home/somebody/tables")


def test_a_user_without_a_home_has_a_folder_of_the_process(tmp_path: Path):
    code = "import sys; from moe.runtime.cache_folder import cache_folder; print(cache_folder(), cache_folder().stat().st_mode)"
    code = "import os; os.path.expanduser = lambda path: path\n" + code
    environment = {name: value for name, value in os.environ.items() if name != "MOE_CACHE_DIR"}
    folders = set()
    for _ in range(2):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | {"TMPDIR": str(tmp_path)}, capture_output=True, check=True)
        folder, mode = done.stdout.decode().split()
        folders.add(folder)
        assert Path(folder).parent == tmp_path
        assert int(mode) & 0o777 == 0o700
        assert not Path(folder).exists()
    assert len(folders) == 2


def test_without_any_folder_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch):
    def refuse(**options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    module._folder_of_this_process.cache_clear()
    try:
        assert not can_write(cache_folder())
    finally:
        module._folder_of_this_process.cache_clear()


def test_a_file_is_replaced_whole_and_has_the_users_permissions(tmp_path: Path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "table.json", "one")
        replace_file(tmp_path / "table.json", "two")
    finally:
        os.umask(before)
    assert (tmp_path / "table.json").read_text() == "two"
    assert (tmp_path / "table.json").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 1


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_what_is_kept_in_a_shared_folder_is_for_all_who_may_write_to_it(tmp_path: Path):
    shared, team, own, sticky = (tmp_path / name for name in ("shared", "team", "own", "sticky"))
    for folder, mode in ((shared, 0o777), (team, 0o2770), (own, 0o755), (sticky, 0o1777)):
        folder.mkdir()
        folder.chmod(mode)
    before = os.umask(0o022)
    try:
        for folder in (shared, team, own, sticky):
            make_folder(folder / "ptx" / "deeper")
            replace_file(folder / "ptx" / "kernel", "text")
            with file_lock(folder / "table.lock"):
                pass
    finally:
        os.umask(before)
    assert [permissions(folder / "ptx" / "deeper") for folder in (shared, own, sticky)] == [0o777, 0o755, 0o755]
    assert permissions(team / "ptx") & 0o777 == 0o770
    assert [permissions(folder / "ptx" / "kernel") for folder in (shared, team, own, sticky)] == [
        0o666,
        0o660,
        0o644,
        0o644,
    ]
    assert [permissions(folder / "table.lock") for folder in (shared, team)] == [0o666, 0o660]


def test_what_cannot_be_kept_is_said_once(tmp_path: Path):
    warn_not_kept.cache_clear()
    with pytest.warns(
        UserWarning, match=r"cannot be written \(Permission denied\), so it is lost; set MOE_CACHE_DIR"
    ) as caught:
        assert [warn_not_kept(tmp_path, "Permission denied", "it is lost") for _ in range(3)] == [None] * 3
    assert len(caught) == 1


KEEP = """
import os, sys
from moe.runtime.cache_folder import cache_folder, can_write, file_lock, replace_file
os.umask(0o022); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
assert can_write(cache_folder() / "ptx")
for path in (cache_folder() / "table.json", cache_folder() / "ptx" / "kernel.ptx"):
    with file_lock(f"{path}.lock", timeout=1):
        replace_file(path, path.read_text() + sys.argv[1] if path.exists() else sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs to be several users")
def test_two_users_of_a_folder_add_to_the_same_files(tmp_path: Path):
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o777)
        for user in ("1001", "1002"):
            environment = os.environ | {"MOE_CACHE_DIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
            subprocess.run([sys.executable, "-c", KEEP, user], env=environment, check=True)
        assert (folder / "table.json").read_text() == (folder / "ptx" / "kernel.ptx").read_text() == "10011002"
    finally:
        shutil.rmtree(folder)
