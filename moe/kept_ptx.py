"""PTX that numba made, kept on disk: making it takes 2 to 4 s a kernel in every process, reading it a millisecond.

A file's name is a hash of all that the PTX follows from, so no file can be out of date: what the kernel was built for, every
source file of this package, numba's version and options, and the libNVVM that is found. Its first line is a hash of
the rest: a file that was cut off or changed is made again. Without a folder to write to, nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe.cache_folder import cache_folder, replace_file

_COMPILERS = ("numba", "numba-cuda", "llvmlite")


def kept_ptx(built_for: str, make: Callable[[], str]) -> str:
    """What `make` returns for `built_for`, from disk where a process before this one made it."""
    path = _path_of(built_for)
    if path is None:
        return make()
    ptx = _read(path)
    if ptx is None:
        ptx = make()
        _write(path, ptx)
    return ptx


def is_kept(built_for: str) -> bool:
    """Whether `kept_ptx` need not make it; also where nothing can be kept, and making it ahead would be in vain."""
    path = _path_of(built_for)
    return path is None or _read(path) is not None


def _path_of(built_for: str) -> Path | None:
    toolchain = _toolchain()
    if toolchain is None:
        return None
    name = _hash("\n".join((built_for, _sources(), toolchain)))
    return cache_folder() / "ptx" / f"{name}.ptx"


def _read(path: Path) -> str | None:
    try:
        first, _, ptx = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return ptx if first == f"// {_hash(ptx)}" else None


def _write(path: Path, ptx: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, f"// {_hash(ptx)}\n{ptx}")
    except OSError:
        pass  # the next process makes it again


@functools.cache
def _sources() -> str:
    """A hash of all Python files of this package."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return _hash("\n".join(f"{file.relative_to(root)} {_hash(file.read_text(encoding='utf-8'))}" for file in files))


@functools.cache
def _toolchain() -> str | None:
    """Versions of the compilers, and their options; None where they cannot be told."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = load_nvidia_dynamic_lib("nvvm").abs_path
        if library is None:
            return None
        status = os.stat(library)
        versions = [f"{name} {version(name)}" for name in _COMPILERS]
    except (ImportError, OSError, RuntimeError, PackageNotFoundError):
        return None
    options = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    return "\n".join((*versions, *options, f"{library} {status.st_size} {status.st_mtime_ns}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
