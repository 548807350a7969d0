"""Where files are kept that can be made again."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """$MOE_CACHE_DIR, else $XDG_CACHE_HOME/moe-stages, else ~/.cache/moe-stages. It need not exist.

    For a user without a home a folder that ends with the process: one that other users can guess could hold their files.
    """
    if folder := os.environ.get("MOE_CACHE_DIR"):
        return Path(os.path.expanduser(folder))
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "moe-stages"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "moe-stages" if os.path.isabs(home) else _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    try:
        folder = tempfile.mkdtemp(prefix="moe-stages-")
    except OSError:
        return Path(os.devnull) / "moe-stages"  # no folder at all: nothing is kept
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def can_write(folder: Path) -> bool:
    """Whether files can be kept in a folder, which is made if it is missing."""
    try:
        make_folder(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Within one that several users write to it is for them too, whatever the umask says.

    Raises:
        OSError: it is not ours to make.
    """
    if folder.is_dir():
        return
    above = folder.parent
    make_folder(above)
    with contextlib.suppress(FileExistsError):  # another process was first
        folder.mkdir()
        if _is_shared(above):
            folder.chmod(stat.S_IMODE(above.stat().st_mode))


def file_lock(path: str | Path, *, timeout: float = -1) -> FileLock:
    """A lock between processes, in a file that all who may write to its folder may lock."""
    mode = _shared_mode(Path(path).parent)
    return FileLock(path, timeout=timeout) if mode is None else FileLock(path, timeout=timeout, mode=mode)


def replace_file(path: Path, text: str) -> None:
    """Write `text` whole or not at all, whoever reads or writes the file meanwhile.

    Raises:
        OSError: the folder is missing, full or not ours to write, or the file another user's who keeps it.
    """
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less what the umask takes off
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            if (mode := _shared_mode(path.parent)) is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@functools.cache
def warn_not_kept(folder: Path, reason: str, consequence: str) -> None:
    """Say, once a process, that files of a folder cannot be written and what comes of it."""
    warnings.warn(
        f"moe: {folder} cannot be written ({reason}), so {consequence}; set MOE_CACHE_DIR to a folder that this user may "
        "write to",
        stacklevel=3,
    )


def _shared_mode(folder: Path) -> int | None:
    """The permissions of files in a folder that several users write to: its own. None where only one does."""
    return stat.S_IMODE(folder.stat().st_mode) & 0o666 if _is_shared(folder) else None


def _is_shared(folder: Path) -> bool:
    """Whether more users than its owner may write to a folder. One with the sticky bit is not: each keeps files of their own."""
    mode = folder.stat().st_mode
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX
