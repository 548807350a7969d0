"""What fits: a layer that would take all memory is refused before anything is made."""

from pathlib import Path

import pytest
import torch

from moe.__main__ import main
from moe.cli import memory
from moe.cli.layer import FORMATS, layer_of_shape, make_layer
from moe.cli.machine import UnfitMachine
from moe.cli.memory import container_bytes, expect_memory, memory_need
from moe.cli.progress import Progress
from moe.cli.run import measure_layer
from moe.shapes import NAMED_SHAPES, MoEShape
from moe.tuning.measure import Peaks

CPU = torch.device("cpu")
GB = 10**9


def named(shape: MoEShape):
    return layer_of_shape(shape, FORMATS["hf"])


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_layer_whose_weights_alone_would_fit_is_refused_before_it_is_made(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shape = NAMED_SHAPES["deepseek-v3"]
    assert 22.5 * GB < shape.weight_bytes < 22.6 * GB
    monkeypatch.setattr(memory, "available_bytes", lambda: int(22.7 * GB))
    monkeypatch.setattr("moe.cli.commands.make_layer", lambda *_, **__: pytest.fail("made"))
    monkeypatch.setattr("moe.cli.bench.make_layer", lambda *_, **__: pytest.fail("made"))
    monkeypatch.setattr("moe.cli.commands.measure_peaks", lambda device: Peaks(1e11, "float32", 1e10))
    arguments = [command, "--model", "deepseek-v3", "--tokens", "64", "--device", "cpu"]
    if command == "run":
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    else:
        assert main(arguments) == 0
    refusal = " ".join(capsys.readouterr().err.split())
    assert "deepseek-v3, 64 tokens: expected 24." in refusal
    assert "(weights 22.5, inputs " in refusal
    assert "got 22.7 GB; pick a smaller model" in refusal


def test_every_part_of_a_run_is_counted():
    shape = NAMED_SHAPES["qwen3-30b-a3b"]
    need = memory_need(named(shape), CPU, 64)
    assert need.weights == shape.weight_bytes
    assert need.expert > 8 * shape.expert_weights
    assert need.inputs > 64 * shape.top_k * (shape.hidden_size + shape.intermediate_size) * 2
    assert need.margin >= 0.05 * (need.weights + need.inputs + need.expert)
    assert need.total == need.weights + need.inputs + need.expert + need.margin


def test_more_tokens_need_more_and_more_than_can_be_numbered_is_said():
    layer = named(NAMED_SHAPES["qwen3-30b-a3b"])
    assert memory_need(layer, CPU, 100_000).inputs > 100 * memory_need(layer, CPU, 64).inputs
    with pytest.raises(
        UnfitMachine, match=r"qwen3-30b-a3b, 1,000,000,000 tokens: num_tokens: expected fewer than 2\^31"
    ):
        expect_memory(layer, CPU, 10**9)


def test_a_run_stays_within_what_it_was_said_to_need(monkeypatch: pytest.MonkeyPatch):
    """Live tensors at their most, by torch's own count of what it allocates."""
    monkeypatch.setattr("moe.cli.run.TURN_BUDGET_S", {"cpu": 0.0})
    shape = MoEShape("small", 512, 1024, 16, 4, "Renormalize", 16)
    layer = named(shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = make_layer(layer, CPU, seed=0, progress=Progress())
        measure_layer(made, 300, routing="zipf", seed=0, progress=Progress())
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    need = memory_need(layer, CPU, 300)
    assert shape.weight_bytes < most <= need.weights + need.inputs + need.expert


def test_a_gpu_is_asked_for_what_is_free_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GB)
    device = torch.device("cuda", 0)
    assert memory.free_device_bytes(device) == 14 * GB
    expect_memory(named(NAMED_SHAPES["olmoe-1b-7b"]), device, 64)
    with pytest.raises(UnfitMachine, match=r"of free memory on cuda:0 .* got 14\.0 GB"):
        expect_memory(named(NAMED_SHAPES["deepseek-v3"]), device, 64)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_group_of_version_2_counts_with_its_cached_files_as_free(tmp_path: Path):
    group(tmp_path / "job", memory__max=8 * GB, memory__current=3 * GB, memory__stat=f"anon 5\ninactive_file {GB}")
    group(tmp_path / "job" / "step", memory__max="max", memory__current=2 * GB)
    (tmp_path / "membership").write_text("0::/job/step\n")
    assert container_bytes(tmp_path / "membership", tmp_path) == [6 * GB]


def test_a_group_of_version_1_is_read_from_the_memory_hierarchy(tmp_path: Path):
    group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=4 * GB,
        memory__usage_in_bytes=GB,
        memory__stat=f"total_inactive_file {GB // 2}",
    )
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    assert container_bytes(tmp_path / "membership", tmp_path) == [int(3.5 * GB)]


def test_a_container_that_is_told_the_hosts_path_finds_its_own_limit_at_the_root(tmp_path: Path):
    group(tmp_path, memory__max=2 * GB, memory__current=GB)
    (tmp_path / "membership").write_text("0::/system.slice/docker-1234.scope\n")
    assert container_bytes(tmp_path / "membership", tmp_path) == [GB]
    (tmp_path / "membership").write_text("0::/../../elsewhere\n")
    assert container_bytes(tmp_path / "membership", tmp_path) == []


def test_no_group_and_no_limit_leave_the_machines_memory(tmp_path: Path):
    assert container_bytes(tmp_path / "absent", tmp_path) == []
    (tmp_path / "membership").write_text("0::/\n")
    assert container_bytes(tmp_path / "membership", tmp_path) == []
    available = memory.available_bytes()
    assert available is None or available > 0
