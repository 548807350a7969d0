"""Where files are kept, and that nobody else's are read in their place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.runtime import cache_folder as module
from moe.runtime.cache_folder import cache_folder, can_write, replace_file


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
