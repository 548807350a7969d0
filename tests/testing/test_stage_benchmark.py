"""Timing a stage of one's own from Python and by pytest-benchmark."""

import pytest

from moe import MoEConfig
from moe.testing import measure_stage
from moe.tuning.measure import Peaks

pytest_plugins = ["pytester"]
SMALL = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
PEAKS = Peaks(1e11, "float32", 1e10)


def my_gemm2(rows, weights, permutation):
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    for tile in range(int(permutation.num_tiles)):
        lines = slice(tile * permutation.tile_rows, (tile + 1) * permutation.tile_rows)
        out[lines] = (rows[lines].float() @ weights[permutation.expert_of_tile[tile]].float().T).bfloat16()
    return out


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.cli.own_stage.BUDGET_S", {"cpu": 0.0})


def test_times_of_a_stage_have_ours_and_dense_beside_them(capsys: pytest.CaptureFixture[str]):
    times = measure_stage("gemm2", my_gemm2, config=SMALL, num_tokens=9, device="cpu")
    assert set(times.turns) == {"mine", "ours", "dense"}
    assert times.accuracy.is_good
    report = times.report(PEAKS)
    assert report["flops"] == 2 * 9 * 2 * 64 * 64
    assert report["share_of_roof"] > 0
    assert report["share_of_ours"] > 0
    assert capsys.readouterr().err == ""


def test_a_stage_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="expected one of route, permute, gemm1, gemm2, finalize, got 'gemm3'"):
        measure_stage("gemm3", my_gemm2, config=SMALL, num_tokens=1, device="cpu")


def test_the_fixture_writes_extra_info(pytester: pytest.Pytester):
    pytest.importorskip("pytest_benchmark")
    pytester.makeconftest('pytest_plugins = ["moe.testing.benchmark"]')
    pytester.makepyfile(
        """
        from moe import MoEConfig, reference_pipeline
        from moe.tuning.measure import Peaks

        def test_time(stage_benchmark):
            config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
            gemm2 = reference_pipeline(config).gemm2
            peaks = Peaks(1e11, "float32", 1e10)
            times = stage_benchmark("gemm2", gemm2, config=config, num_tokens=3, device="cpu", num_turns=3, peaks=peaks)
            assert times.accuracy.is_good
        """
    )
    result = pytester.runpytest("--benchmark-json=stage.json", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    import json

    (line,) = json.loads((pytester.path / "stage.json").read_text())["benchmarks"]
    assert {"device_us", "ours_us", "dense_us", "flops", "num_bytes", "share_of_roof"} <= set(line["extra_info"])
