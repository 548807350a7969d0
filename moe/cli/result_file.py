"""A file for results that took long to find: tried before the work, written whole each time, and never the only place."""

from __future__ import annotations

import datetime
import json
import os
import stat
import tempfile
from pathlib import Path

from moe.cli.machine import UnfitMachine
from moe.cli.progress import Progress
from moe.runtime.cache_folder import replace_file

PROBE_BYTES = 1 << 16  # a disk that takes so much takes most reports


def today() -> str:
    return datetime.date.today().isoformat()


class ResultFile:
    """JSON, or a page, that is written again and again, with more in it each time.

    What cannot be written is kept, tried again the next time, and in the end put into a file of its own among the temporary ones.
    """

    def __init__(self, option: str, path: Path) -> None:
        """Raise UnfitMachine where the file cannot be written."""
        self._option, self._path = option, path
        self._text = ""
        self._failure: OSError | None = None
        expect_writable(option, path)

    def write(self, report: dict[str, object]) -> None:
        self.write_text(json.dumps(report, indent=1) + "\n")

    def write_text(self, text: str) -> None:
        self._text = text
        try:
            _write(self._path, self._text)
            self._failure = None
        except OSError as failure:
            self._failure = failure

    def is_written(self, progress: Progress) -> bool:
        """Whether the last report is in the file; where it is not, it is put elsewhere, and `progress` says where."""
        if self._failure is None:
            return True
        suffix = self._path.suffix or ".json"
        with tempfile.NamedTemporaryFile("w", prefix="moe-", suffix=suffix, delete=False, encoding="utf-8") as file:
            file.write(self._text)
        progress.note(f"{self._option} {self._path}: {self._failure.strerror}; the results are in {file.name}")
        return False


def expect_apart(files: dict[str, Path | None]) -> None:
    """Raise UnfitMachine where two options name one file, of which the second would take the place of the first."""
    option_of: dict[str, str] = {}
    for option, path in files.items():
        if path is None or (path.exists() and not path.is_file()):
            continue
        other = option_of.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UnfitMachine(f"{option} {path}: expected another file than {other}, got the same; name another")


def expect_writable(option: str, path: Path) -> None:
    """Raise UnfitMachine where a result could not be written in the end: a little is written, and what was there stays."""
    wanted = f"{option} {path}: expected a file in a folder that can be written"
    if path.is_dir() or not path.parent.is_dir():
        raise UnfitMachine(f"{wanted}, got {'a folder' if path.is_dir() else 'no such folder'}; name another")
    try:
        if not path.exists() or stat.S_ISREG(path.stat().st_mode):
            if path.exists():
                with path.open("ab"):
                    pass
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(b" " * PROBE_BYTES)
                file.flush()
        elif stat.S_ISCHR(path.stat().st_mode):
            path.write_text("\n")
    except OSError as error:
        raise UnfitMachine(f"{wanted}, got {error.strerror}; name another") from error


def _write(path: Path, text: str) -> None:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_text(text)
    else:
        replace_file(Path(os.path.realpath(path)), text)
