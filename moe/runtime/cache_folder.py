"""Where files are kept that can be made again."""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import shutil
import tempfile
from pathlib import Path


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
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def replace_file(path: Path, text: str) -> None:
    """Write `text` whole or not at all, whoever reads or writes the file meanwhile.

    Raises:
        OSError: the folder is missing, full or not ours to write.
    """
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less what the umask takes off
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
