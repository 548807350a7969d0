"""PTX that numba made, kept on disk: making it takes 2 to 4 s a kernel in every process, reading it a millisecond.

A file's name is a hash of all that the PTX follows from, so no file can be out of date: what the kernel was built for,
every source file of this package, numba's version and options, and the libNVVM that is found. Its first line is a hash
of the rest: a file that was cut off or changed is made again. Nothing is kept without a folder to write to, nor where the
package's files are not those that this process began with.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe.runtime.cache_folder import cache_folder, can_write, make_folder, replace_file, warn_not_kept

MAX_FILES = 512  # a kernel takes 20 to 200 KB
_COMPILERS = ("numba", "numba-cuda", "llvmlite")
_PLACES = ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")  # where numba looks for libdevice


def cached_ptx(built_for: str, make: Callable[[], str]) -> str:
    """What `make` returns for `built_for`, from disk where a process before this one made it."""
    path = _path_of(built_for)
    if path is None:
        return make()
    ptx = _read(path)
    if ptx is None:
        ptx = make()
        if path == _path_of(built_for):  # no file of the package changed meanwhile
            _write(path, ptx)
    return ptx


def is_cached(built_for: str) -> bool:
    """Whether `cached_ptx` would find it on disk."""
    path = _path_of(built_for)
    return path is not None and _read(path) is not None


def can_keep() -> bool:
    """Whether what `cached_ptx` makes is there for other processes."""
    return _path_of("") is not None and can_write(_folder())


def _folder() -> Path:
    return cache_folder() / "ptx"


def _path_of(built_for: str) -> Path | None:
    toolchain = _toolchain()
    if toolchain is None or _files() is None or _files() != _FILES_AT_IMPORT:
        return None
    name = _hash("\n".join((built_for, _sources(), toolchain)))
    return _folder() / f"{name}.ptx"


def _read(path: Path) -> str | None:
    try:
        first, _, ptx = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return ptx if first == f"// {_hash(ptx)}" else None


def _write(path: Path, ptx: str) -> None:
    try:
        make_folder(path.parent)
        replace_file(path, f"// {_hash(ptx)}\n{ptx}")
        _remove_oldest(path.parent)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        warn_not_kept(path.parent, reason, "each process makes the PTX of its kernels again, 2 to 4 s a kernel")


def _remove_oldest(folder: Path) -> None:
    """Leave the files that were written last: each version of the package writes files of its own."""
    files = list(folder.glob("*.ptx"))
    if len(files) > MAX_FILES:
        for file in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - MAX_FILES]:
            file.unlink(missing_ok=True)


def _files() -> tuple[tuple[str, int, int], ...] | None:
    """This package's Python files, when each was changed and how long it is; None where they cannot be told."""
    try:
        return tuple(sorted(_signature(file) for file in _package_files()))
    except OSError:
        return None


def _signature(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_mtime_ns, status.st_size


def _package_files() -> list[Path]:
    """All but hidden ones: editors and other systems leave files beside ours that are no Python."""
    return [file for file in _package().rglob("*.py") if not file.name.startswith(".")]


def _package() -> Path:
    """The folder of `moe`, which kernels of all stages come from."""
    return Path(__file__).parents[1]


@functools.cache
def _sources() -> str:
    """A hash of all Python files of this package."""
    root = _package()
    files = ((str(file.relative_to(root)), file.read_bytes()) for file in sorted(_package_files()))
    return _hash("\n".join(f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in files))


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
    options = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_") or name in _PLACES
    ]
    return "\n".join((sys.version, *versions, *options, f"{library} {status.st_size} {status.st_mtime_ns}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# What is compiled was imported from these. Files that change under a running process may be imported by another one.
_FILES_AT_IMPORT = _files()
