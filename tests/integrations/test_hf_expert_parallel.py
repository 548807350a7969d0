"""transformers' own parallelism of experts, over gloo: expert_parallel_cases.py says what each case holds."""

from __future__ import annotations

import pytest
from parallel.processes import run_cases

pytest.importorskip("transformers.distributed.expert_parallel", reason="a later transformers splits experts so")
from integrations.expert_parallel_cases import CASES


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    preload = ("transformers.distributed.expert_parallel", "transformers.models.qwen3_moe.modeling_qwen3_moe")
    return run_cases(2, CASES, tmp_path_factory.mktemp("ranks"), preload=preload)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, reports):
    assert not reports[case], reports[case]
