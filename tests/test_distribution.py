"""What a release holds: the wheel and the source distribution are built, looked into and run."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
SOURCES = ("moe", "tests", "docs", ".ci", "Makefile", "README.md", "LICENSE", "pyproject.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from a copy of the sources with what is installed here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    assert re.fullmatch(r"moe_stages-[\d.]+-py3-none-any\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moe").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == package
    assert {"moe/py.typed", "moe/testing/__init__.py", "moe/cli/__init__.py"} <= names
    assert any(name.startswith("moe/tuning/tables/") and name.endswith(".json") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_wheel_names_its_extras_and_its_pythons(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    extras = set(re.findall(r"^Provides-Extra: (\S+)", text, re.MULTILINE))
    assert {"cuda13", "hf", "plot", "progress", "test", "dev"} <= extras
    assert "Requires-Python: >=3.10" in text
    assert "License-Expression: Apache-2.0" in text


def test_the_wheel_runs_by_itself(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import moe, moe.testing; print(moe.__file__); from moe.__main__ import main; main(['info', '--device', 'cpu'])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))
    assert "stages on this device" in run.stdout


def test_the_source_distribution_holds_what_make_test_needs(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml", "tests/conftest.py", ".ci/constraints.txt"} <= names
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names


def test_messages_name_what_pip_can_find():
    """An extra of a package that no index has is no cure."""
    for path in (ROOT / "moe").rglob("*.py"):
        assert "moe-stages[" not in path.read_text(), f"{path.name}: name the requirements, as the extra has them"
    pyproject = (ROOT / "pyproject.toml").read_text()
    from moe.cli import plot
    from moe.integrations import huggingface
    from moe.runtime import numba_launch

    texts = (huggingface.INSTALL, numba_launch._INSTALL, Path(plot.__file__).read_text())
    for requirement in re.findall(
        r'"((?:transformers|matplotlib|numba-cuda|cuda-toolkit|nvidia-nvjitlink)\S+)"', " ".join(texts)
    ):
        assert f'"{requirement}' in pyproject, requirement
