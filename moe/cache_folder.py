"""Where files are kept that can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$MOE_CACHE_DIR, else $XDG_CACHE_HOME/moe-stages, else ~/.cache/moe-stages. It need not exist."""
    if folder := os.environ.get("MOE_CACHE_DIR"):
        return Path(folder)
    home = os.path.expanduser("~")
    # A user without a home leaves the tilde as it is.
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(
        home if os.path.isabs(home) else tempfile.gettempdir(), ".cache"
    )
    return Path(caches) / "moe-stages"


def replace_file(path: Path, text: str) -> None:
    """Write `text` whole or not at all, whoever reads or writes the file meanwhile.

    Raises:
        OSError: the folder is missing, full or not ours to write.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # a cache folder may be shared
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
