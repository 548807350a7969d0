"""Files of tuned choices: what is kept, what is refused, and that nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe import FLASHINFER, MoEConfig, WeightFormat, WeightLayout
from moe.gemm.config import GemmConfig
from moe.tuning import table as table_module
from moe.tuning.buckets import BUCKETS
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import KERNELS_VERSION, GpuModel, has_same_minor, triton_version
from moe.tuning.table import (
    SHIPPED_TABLES,
    LayerKey,
    TableEntry,
    TuningTable,
    UnusableTable,
    by_layer,
    export_into,
    load_table,
    merge_into,
    shipped_table_path,
    user_table_path,
)

GPU = GpuModel(name="Test GPU-9000 (80GB)", capability=(9, 0), num_sms=132, l2_bytes=50 << 20, memory_bytes=80 << 30)
BASE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_experts": 16,
    "num_local_experts": 8,
    "top_k": 4,
}
KEY = LayerKey.of(MoEConfig.create(**BASE))
PLAIN = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


def entry(bucket: int = 8, *, tuned_us: float = 9.5, key: LayerKey = KEY, tile_rows: int = 32) -> TableEntry:
    return TableEntry(
        key=key, bucket=bucket, choice=TuningChoice(tile_rows=tile_rows), tuned_us=tuned_us, model_us=10.0
    )


def valid_text(*entries: TableEntry) -> str:
    return TuningTable.create(GPU, entries or (entry(1), entry(8))).text()


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(valid_text()) | fields)


def load_and_reports(path: Path, gpu: GpuModel = GPU) -> tuple[TuningTable | None, list[str]]:
    reports: list[str] = []
    return load_table(path, gpu, report=reports.append), reports


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 512},
        {"intermediate_size": 64},
        {"num_experts": 32},
        {"num_local_experts": 4},
        {"top_k": 2},
        {"activation": "Relu2"},
        {"weight_format": WeightFormat(layout=WeightLayout.MajorMn)},
        {"weight_format": WeightFormat(is_shuffled=True)},
        {"weight_format": WeightFormat(gate_up_order="up_gate")},
    ],
    ids=str,
)
def test_what_timings_depend_on_makes_another_key(change: dict[str, Any]):
    assert LayerKey.of(MoEConfig.create(**BASE | change)) != KEY


@pytest.mark.parametrize("weight_format", [FLASHINFER, WeightFormat(is_shuffled=True)], ids=["layout", "is_shuffled"])
def test_a_second_weight_that_lies_otherwise_makes_another_key(weight_format: WeightFormat):
    config = MoEConfig.create(**BASE)
    gemm2 = GemmConfig(**dict(config.gemm2) | {"weight_format": weight_format})
    assert LayerKey.of(MoEConfig(**dict(config) | {"gemm2": gemm2})) != KEY


@pytest.mark.parametrize(
    "change",
    [
        {"method": "DeepSeekV3", "n_group": 4, "topk_group": 2},
        {"local_expert_offset": 8},
        {"routed_scaling_factor": 2.5},
        {"norm_topk_prob": False},
        {"tile_rows": 64},
    ],
    ids=str,
)
def test_what_timings_do_not_depend_on_makes_no_other_key(change: dict[str, Any]):
    assert LayerKey.of(MoEConfig.create(**BASE | change)) == KEY


OTHER_VALUES = {
    "activation": "Relu2",
    "layout": "MajorMn",
    "is_shuffled": True,
    "gate_up_order": "up_gate",
    "gemm2_layout": "BlockMajorK",
    "gemm2_is_shuffled": True,
}


@given(
    st.sampled_from(sorted(set(LayerKey.model_fields) - {"dtype"})),
    st.integers(1, 1 << 20),
    st.sampled_from(BUCKETS),
)
def test_keys_that_differ_in_any_field_keep_entries_of_their_own(name: str, number: int, bucket: int):
    value = OTHER_VALUES.get(name, number)
    other = LayerKey(**dict(KEY) | {name: value})
    entries = TuningTable.create(GPU, [entry(bucket), entry(bucket, key=other)]).entries
    assert len(entries) == (1 if value == getattr(KEY, name) else 2)


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
        ("../../etc/passwd", "etc_passwd"),
        ("図", "gpu"),
    ],
)
def test_a_file_is_named_after_the_gpu(name: str, file_name: str):
    assert GpuModel(**dict(GPU) | {"name": name}).slug() == file_name


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MOE_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"MOE_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/moe-stages"),
        ({"MOE_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/moe-stages"),
    ],
    ids=["MOE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"],
)
def test_where_the_users_table_lies(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(table_module, "triton_version", lambda: "3.6.1+git")
    monkeypatch.setattr(table_module, "KERNELS_VERSION", 7)
    assert user_table_path(GPU) == Path(expected) / "test_gpu_9000_80gb-kernels7-triton3.6.json"


def test_environments_with_other_versions_leave_each_others_tables_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path))
    versions = [(triton, kernels) for triton in ("3.6.0", "3.7.1") for kernels in (2, 3)]
    for _ in range(3):
        for bucket, (triton, kernels) in enumerate(versions, 1):
            monkeypatch.setattr(table_module, "triton_version", lambda triton=triton: triton)
            monkeypatch.setattr(table_module, "KERNELS_VERSION", kernels)
            assert [one.bucket for one in merge_into(user_table_path(GPU), GPU, [entry(bucket)]).entries] == [bucket]
    assert len(list(tmp_path.glob("*.json"))) == len(versions)
    assert not list(tmp_path.glob("*.bak*"))


def test_each_release_of_triton_has_a_shipped_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table_module, "SHIPPED_TABLES", tmp_path)
    releases = ("3.6.0", "3.8.0", "3.9.0")
    for bucket, triton in enumerate(releases, 1):
        monkeypatch.setattr(table_module, "triton_version", lambda triton=triton: triton)
        export_into(shipped_table_path(GPU), GPU, [entry(bucket)])
    for bucket, triton in enumerate(("3.6.1", "3.8.2", "3.9.0"), 1):
        monkeypatch.setattr(table_module, "triton_version", lambda triton=triton: triton)
        table = load_table(shipped_table_path(GPU), GPU)
        assert table is not None
        assert (table.triton, [one.bucket for one in table.entries]) == (releases[bucket - 1], [bucket])
    monkeypatch.setattr(table_module, "triton_version", lambda: "3.7.1")
    assert load_table(shipped_table_path(GPU), GPU) is None


def test_an_export_adds_to_a_table_and_leaves_no_other_file(tmp_path: Path):
    path = tmp_path / "table.json"
    export_into(path, GPU, [entry(1)])
    table = export_into(path, GPU, [entry(8)])
    assert [one.bucket for one in table.entries] == [1, 8]
    assert load_and_reports(path) == (table, [])
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("name", ["not JSON", "other triton", "other kernels", "other GPU", "empty"])
def test_an_export_leaves_a_file_that_it_cannot_add_to_as_it_is(name: str, tmp_path: Path):
    path, (text, reason) = tmp_path / "notes.md", BAD_TEXTS[name]
    path.write_text(text)
    with pytest.raises(UnusableTable, match=reason):
        export_into(path, GPU, [entry(8)])
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["notes.md"]


def test_a_table_comes_back_from_its_file(tmp_path: Path):
    table = TuningTable.create(GPU, [entry(8), entry(1), entry(8, key=LayerKey(**dict(KEY) | {"top_k": 1}))])
    (tmp_path / "table.json").write_text(table.text())
    assert load_and_reports(tmp_path / "table.json") == (table, [])


def test_the_text_does_not_depend_on_the_order_of_the_entries_and_has_one_a_line():
    entries = [entry(bucket) for bucket in (12, 1, 131072, 8)]
    text = valid_text(*entries)
    assert valid_text(*entries[::-1]) == text
    rows = [json.loads(line.rstrip(",")) for line in text.splitlines() if '"bucket"' in line]
    assert [row["bucket"] for row in rows] == [1, 8, 12, 131072]


def test_an_empty_table_is_valid(tmp_path: Path):
    table = TuningTable.create(GPU)
    (tmp_path / "table.json").write_text(table.text())
    assert load_and_reports(tmp_path / "table.json") == (table, [])


def test_a_missing_file_says_nothing(tmp_path: Path):
    assert load_and_reports(tmp_path / "none" / "table.json") == (None, [])
    (tmp_path / "file").write_text("")
    assert load_and_reports(tmp_path / "file" / "table.json") == (None, [])


def other_gpu(**fields: Any) -> dict[str, Any]:
    return {"gpu": GPU.model_dump(mode="json") | fields}


BAD_TEXTS = {
    "empty": ("", "EOF"),
    "truncated": (valid_text()[:-40], "EOF|Invalid JSON"),
    "not JSON": ("table: yes", "Invalid JSON"),
    "a list": ("[1]", "object"),
    "a number": ("3", "object"),
    "older format": (changed(format_version=0), "expected format_version 1, got 0"),
    "newer format": (changed(format_version=2, more=1), "expected format_version 1, got 2"),
    "format as text": (changed(format_version="1"), "format_version"),
    "other kernels": (changed(kernels_version=KERNELS_VERSION + 1), "kernels_version"),
    "other triton": (changed(triton="2.1.0"), "under triton .*, got 2.1.0"),
    "other GPU": (changed(**other_gpu(name="NVIDIA H100")), "expected timings of Test GPU-9000"),
    "a slice of the GPU": (changed(**other_gpu(num_sms=16)), "132 SMs"),
    "unknown field": (changed(extra=1), "extra"),
    "entries of a wrong type": (changed(entries={"a": 1}), "entries"),
    "entry without a key": (changed(entries=[{"bucket": 1}]), "entries.0.key"),
    "endless time": (valid_text().replace("9.5", "Infinity"), "tuned_us"),
    "bucket as text": (valid_text().replace('"bucket": 8', '"bucket": "8"'), "bucket"),
    "impossible tile": (valid_text().replace('"tile_rows": 32', '"tile_rows": 33'), "power of two"),
    "deep": ('{"format_version": 1, "entries": ' + "[" * 100_000, "recursion|EOF|Invalid"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_file_that_cannot_be_used_is_none_and_one_line(name: str, tmp_path: Path):
    text, reason = BAD_TEXTS[name]
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert load_table(path, GPU) is None
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(path) in message
    assert "\n" not in message


def test_memory_and_a_patch_of_triton_do_not_make_a_table_foreign(tmp_path: Path):
    major, minor = triton_version().split(".")[:2]
    path = tmp_path / "table.json"
    path.write_text(changed(triton=f"{major}.{minor}.99", **other_gpu(memory_bytes=1)))
    table, reports = load_and_reports(path)
    assert table is not None
    assert (len(table.entries), reports) == (2, [])


@pytest.mark.parametrize(
    ("version", "other", "expected"),
    [("3.6.0", "3.6.1+git", True), ("3.6.0", "3.60.0", False), ("3.6", "4.6", False), ("none", "3.6.0", False)],
)
def test_versions_are_compared_up_to_the_minor_number(version: str, other: str, expected: bool):
    assert has_same_minor(version, other) is expected


def test_a_huge_file_is_not_read_whole(tmp_path: Path):
    path = tmp_path / "table.json"
    with path.open("wb") as file:
        file.truncate(1 << 36)
    table, reports = load_and_reports(path)
    assert table is None
    assert "expected at most 16777216 bytes" in reports[0]


def test_a_directory_and_a_pipe_are_no_tables(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, reason in ((tmp_path, "a directory"), (pipe, "expected a file")):
        table, reports = load_and_reports(path)
        assert table is None
        assert len(reports) == 1
        assert reason in reports[0]


def test_a_file_that_may_not_be_read_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    path.write_text(valid_text())

    def refuse(*arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root reads whatever the mode says
    assert load_and_reports(path) == (None, [f"{path} is not used: Permission denied"])


@settings(**PLAIN)
@given(st.binary(max_size=200))
def test_any_bytes_are_none_and_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    table, reports = load_and_reports(path)
    assert (table, len(reports)) == (None, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(**PLAIN)
@given(JSON)
def test_any_json_is_none_and_one_line(tmp_path: Path, value: Any):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(value))
    table, reports = load_and_reports(path)
    assert (table, len(reports)) == (None, 1)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document lie."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, part in items for inner in paths_of(part, (*path, key)))]


MUTABLE = [path for path in paths_of(json.loads(valid_text())) if path]


@settings(**PLAIN)
@given(st.sampled_from(MUTABLE), JSON)
def test_a_table_with_any_value_changed_is_valid_or_none_and_one_line(
    tmp_path: Path, place: tuple[Any, ...], value: Any
):
    document = json.loads(valid_text())
    part = document
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    table, reports = load_and_reports(path)
    assert len(reports) == (1 if table is None else 0)
    if table is not None:
        again = load_text(tmp_path, table.text())
        assert set(again.entries) == set(table.entries)  # in the file's own order
        assert again.text() == table.text()


def load_text(folder: Path, text: str) -> TuningTable | None:
    (folder / "again.json").write_text(text)
    return load_table(folder / "again.json", GPU)


@settings(**PLAIN)
@given(st.integers(0, len(valid_text()) - 3))
def test_a_table_cut_short_anywhere_is_none_and_one_line(tmp_path: Path, length: int):
    path = tmp_path / "table.json"
    path.write_text(valid_text()[:length])
    table, reports = load_and_reports(path)
    assert (table, len(reports)) == (None, 1)


def test_merging_keeps_what_is_there_and_newer_entries_win(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "table.json"
    merge_into(path, GPU, [entry(1), entry(8, tuned_us=9.0)])
    merged = merge_into(path, GPU, [entry(8, tuned_us=7.0), entry(16)])
    assert [(one.bucket, one.tuned_us) for one in merged.entries] == [(1, 9.5), (8, 7.0), (16, 9.5)]
    assert load_and_reports(path) == (merged, [])


def test_nothing_but_the_table_and_its_lock_is_left(tmp_path: Path):
    merge_into(tmp_path / "table.json", GPU, [entry()])
    assert {path.name for path in tmp_path.iterdir()} - {"table.json.lock"} == {"table.json"}


def test_a_link_to_a_table_stays_a_link(tmp_path: Path):
    target, link = tmp_path / "target.json", tmp_path / "table.json"
    link.symlink_to(target)
    merge_into(link, GPU, [entry()])
    assert link.is_symlink()
    assert load_and_reports(target)[0] is not None


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_file_that_is_not_ours_is_moved_aside_before_it_is_written(name: str, tmp_path: Path):
    path, reports = tmp_path / "table.json", []
    path.write_text(BAD_TEXTS[name][0])
    merged = merge_into(path, GPU, [entry()], report=reports.append)
    assert (tmp_path / "table.json.bak").read_text() == BAD_TEXTS[name][0]
    assert load_and_reports(path) == (merged, [])
    assert len(reports) == 1
    assert "was moved to table.json.bak" in reports[0]


def test_a_second_bad_file_does_not_replace_the_first_that_was_moved(tmp_path: Path):
    path = tmp_path / "table.json"
    for text in ("first", "second", "third"):
        path.write_text(text)
        merge_into(path, GPU, [entry()], report=lambda line: None)
    assert [(tmp_path / f"table.json.bak{end}").read_text() for end in ("", "2", "3")] == ["first", "second", "third"]


def test_a_directory_in_the_tables_place_is_left_alone(tmp_path: Path):
    path, reports = tmp_path / "table.json", []
    (path / "inside").mkdir(parents=True)
    merged = merge_into(path, GPU, [entry()], report=reports.append)
    assert (path / "inside").is_dir()
    assert merged.entries == (entry(),)
    assert len(reports) == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_the_entries_count(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        merged = merge_into(tmp_path / "file" / "table.json", GPU, [entry()])
    assert len(caught) == 1
    assert merged.entries == (entry(),)


def test_a_disk_that_fills_up_leaves_the_old_table_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, reports = tmp_path / "table.json", []
    old = merge_into(path, GPU, [entry(1)])

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    merged = merge_into(path, GPU, [entry(8)], report=reports.append)
    monkeypatch.undo()
    assert load_and_reports(path) == (old, [])
    assert [one.bucket for one in merged.entries] == [1, 8]
    assert "No space left on device" in reports[0]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_lock_that_is_never_released_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from filelock import FileLock

    path, reports = tmp_path / "table.json", []
    monkeypatch.setattr(table_module, "LOCK_TIMEOUT_S", 0.05)
    with FileLock(f"{path}.lock"):
        merged = merge_into(path, GPU, [entry()], report=reports.append)
    assert merged.entries == (entry(),)
    assert len(reports) == 1
    assert not path.exists()


NUM_PROCESSES, MERGES = 4, 10


def _merge_many(path: Path, process: int) -> None:
    for number in range(MERGES):
        key = LayerKey(**dict(KEY) | {"hidden_size": 1 + process * MERGES + number})
        merge_into(path, GPU, [entry(key=key), entry(64, tuned_us=1.0 + process)])


def _merge_one(path: Path, process: int) -> None:
    merge_into(path, GPU, [entry(64, tuned_us=1.0 + process)], seen={})


def test_of_processes_that_saw_no_entry_the_first_that_writes_counts(tmp_path: Path):
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_merge_one, args=(path, number)) for number in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (first,) = load_and_reports(path)[0].entries
    for process in range(NUM_PROCESSES):
        assert merge_into(path, GPU, [entry(64, tuned_us=1.0 + process)], seen={}).entries == (first,)
    newer = entry(64, tuned_us=0.5)
    assert merge_into(path, GPU, [newer], seen=by_layer([first])).entries == (newer,)


def test_four_processes_that_tune_at_once_lose_nothing(tmp_path: Path):
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_merge_many, args=(path, number)) for number in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert load_and_reports(path)[1] == []  # a reader takes no lock, and never sees half a table
    for process in processes:
        process.join()
        assert process.exitcode == 0
    table, reports = load_and_reports(path)
    assert table is not None
    sizes = sorted(one.key.hidden_size for one in table.entries if one.bucket == 8)
    assert (sizes, reports) == (list(range(1, 1 + NUM_PROCESSES * MERGES)), [])
    assert len(table.entries) == NUM_PROCESSES * MERGES + 1


def test_shipped_tables_are_ours_sorted_and_of_the_kernels_of_today():
    paths = list(SHIPPED_TABLES.glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text()
        table = TuningTable.model_validate_json(text)
        assert table_module.shipped_table_path(table.gpu, table.triton) == path
        assert table.kernels_version == KERNELS_VERSION, f"{path.name}: kernels changed since; run the tuner again"
        assert text == table.text(), f"{path.name}: written by hand; let export_into write it"


def test_importing_the_tables_loads_no_kernel_compiler():
    code = "import sys, moe.tuning\nprint([name for name in ('triton', 'numba') if name in sys.modules])\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_table_of_ours_is_read_without_a_word(tmp_path: Path):
    path = tmp_path / "table.json"
    merge_into(path, GPU, [entry()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = load_table(path, GPU)
    assert table is not None
    assert table.entries == (entry(),)
