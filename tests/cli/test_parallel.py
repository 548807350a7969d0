"""`bench --parallel` says how it is started; tests/parallel/cases.py runs it between processes."""

from __future__ import annotations

import pytest

from moe.__main__ import main
from moe.cli.parallel import Parts


def test_bench_parallel_outside_torchrun_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--parallel"])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "--parallel: expected to be started by torchrun; run torchrun --nproc-per-node=2 -m moe bench --parallel"
        in said
    )


def test_parallel_and_a_stage_of_ones_own_do_not_go_together(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--parallel", "--stage", "gemm2=a:b"])
    assert "--stage: not with --parallel" in " ".join(capsys.readouterr().err.split())


def test_rates_are_bytes_over_the_time_of_their_phase():
    parts = Parts(10.0, 100.0, 20.0, 130.0, 150.0, dispatch_bytes=4_000_000, combine_bytes=2_000_000)
    report = parts.report(450e9)
    assert report["dispatch_bytes_per_s"] == pytest.approx(400e9)
    assert report["dispatch_share_of_link"] == pytest.approx(400 / 450)
    assert report["combine_share_of_link"] == pytest.approx(100 / 450)
    assert parts.report(None)["combine_share_of_link"] is None
