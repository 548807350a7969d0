"""No test reads or writes the tables of whoever runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.tuning.lookup import forget_tables


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of user's tables for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOE_CACHE_DIR", str(folder))
    forget_tables()
    yield folder
    forget_tables()
