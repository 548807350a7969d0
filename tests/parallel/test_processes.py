"""The exchanges between processes, over gloo: cases.py says what each case holds."""

from __future__ import annotations

import pytest
from parallel.cases import CASES
from parallel.processes import run_cases


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_cases(4, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_four_processes(case, reports):
    assert not reports[case], reports[case]
