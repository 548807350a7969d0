"""The document of the results, from made-up ones."""

import json
from pathlib import Path

import pytest
import report


def measured(model: str, num_tokens: int, experts_us: float, *, roof_us: float = 17.7) -> dict:
    stages = {name: {"median_us": 1.0, "roof_us": 0.5} for name in (*report.STAGES, "whole")}
    stages["experts"] = {"median_us": experts_us, "roof_us": roof_us}
    peaks = {"matmul_flops": 7e14, "matmul_dtype": "bfloat16", "copy_bytes_per_s": 4e12}
    result = {"model": model, "routing": "uniform", "num_tokens": num_tokens, "stages": stages, "peaks": peaks}
    return result | {"accuracy": {"relative_frobenius": 3e-3}}


@pytest.fixture
def peers() -> dict:
    return json.loads(report.PEERS.read_text())


def test_lead_is_over_the_fastest_peer_of_the_cell(peers: dict):
    (line,) = report.read_lines([measured("qwen3-30b-a3b", 1, 13.7)], peers)
    assert (line.peer, line.peer_us) == ("SGLang, tuned", 27.4)
    assert line.lead == pytest.approx(2.0)
    assert "| 27.4 | 2.00 |" in report.table_text([line])
    says = "At least as fast as the best peer in 1 of 1 cells, by more than 5% in 1; more than 5% slower in 0. Geometric mean of the lead **2.00**."
    assert says in report.summary_text([line])


def test_cell_of_another_draw_is_marked_and_left_out_of_the_summary(peers: dict):
    (line,) = report.read_lines([measured("qwen3-30b-a3b", 1, 13.7, roof_us=10.0)], peers)
    assert "2.00 †" in report.table_text([line])
    assert report.summary_text([line]) == "No cell of this run has a peer."


def test_layer_without_a_peer_has_empty_cells(peers: dict):
    (line,) = report.read_lines([measured("kimi-k2", 1, 100.0)], peers)
    assert report.table_text([line]).endswith("|  |  |  |")


def test_what_was_timed_beside_a_layer_has_a_table_of_its_own(peers: dict):
    result = measured("kimi-k2", 1, 100.0) | {
        "beside_us": {"experts": 101.0, "dense": 55.0, "eager": 62.5, "eager_experts": 50.5}
    }
    lines = report.read_lines([result, measured("kimi-k2", 8, 100.0)], peers)
    assert report.beside_text(lines).splitlines()[2:] == ["| kimi-k2 | 1 | 101 |  | 55.0 |  | 1.00 | 62.5 | 50.5 |"]


def test_lines_go_by_layer_then_routing_then_tokens(peers: dict):
    results = [measured("sonic-7b", 8, 1.0), measured("kimi-k2", 1, 1.0), measured("sonic-7b", 1, 1.0)]
    zipf = measured("sonic-7b", 2, 1.0) | {"routing": "zipf"}
    lines = report.read_lines([zipf, *results], peers)
    assert [(line.model, line.routing, line.num_tokens) for line in lines] == [
        ("sonic-7b", "uniform", 1),
        ("sonic-7b", "uniform", 8),
        ("sonic-7b", "zipf", 2),
        ("kimi-k2", "uniform", 1),
    ]


def test_every_cell_of_the_peers_names_known_libraries(peers: dict):
    assert len(peers["cells"]) == 60
    assert all(set(cell["us"]) <= set(peers["libraries"]) for cell in peers["cells"])


def test_command_fills_the_page_and_draws_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    page = tmp_path / "performance.md"
    parts = ("run", "summary", "table", "beside", "launches")
    page.write_text("".join(f"text\n<!-- {part}: begin -->\nold\n<!-- {part}: end -->\n" for part in parts))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PICTURE", tmp_path / "performance.svg")
    machine = {
        "name": "a GPU",
        "details": "large",
        "versions": dict.fromkeys(("torch", "triton", "numba-cuda", "cuda-core", "cuda of torch"), "1"),
    }
    results = tmp_path / "bench.json"
    results.write_text(json.dumps({"machine": machine, "results": [measured("qwen3-30b-a3b", 1, 13.7)]}))
    launches = tmp_path / "launches.txt"
    launches.write_text("1  1.5  topk_kernel\n")
    report.main([str(results), "--date", "2026-01-02", "--driver", "580", "--launches", str(launches)])
    text = page.read_text()
    assert "old" not in text
    assert text.count("text\n") == 5
    assert "```\n1  1.5  topk_kernel\n```" in text
    assert "2026-01-02, one a GPU" in text
    assert "</svg>" in (tmp_path / "performance.svg").read_text()


def test_the_table_of_a_page_reads_as_it_was_written(peers: dict):
    results = [measured("qwen3-30b-a3b", 1, 13.7), measured("sonic-7b", 8, 40.0)]
    lines = report.read_lines([*results, measured("sonic-7b", 8, 41.0) | {"routing": "zipf"}], peers)
    page = f"text\n<!-- table: begin -->\n{report.table_text(lines)}\n<!-- table: end -->\n"
    read = report.lines_of_page(page, peers)
    assert report.table_text(read) == report.table_text(lines)
    assert [line.lead for line in read if line.peer_us] == [line.lead for line in lines if line.peer_us]


def test_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected a page with"):
        report.replace_part("page", "table", "text")
