"""Whose choice counts: the user's table, the shipped one, the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from moe import MoEConfig
from moe.tuning import lookup, table
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import forget_tables, is_tuned, look_up, remember
from moe.tuning.table import LayerKey, TableEntry, merge_into, user_table_path

GPU = GpuModel(name="Test GPU", capability=(9, 0), num_sms=132, l2_bytes=50 << 20, memory_bytes=80 << 30)
CONFIG = MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=16, top_k=4)
SHIPPED, USERS = TuningChoice(tile_rows=16), TuningChoice(tile_rows=64)


def entry(bucket: int, choice: TuningChoice, config: MoEConfig = CONFIG) -> TableEntry:
    return TableEntry(key=LayerKey.of(config), bucket=bucket, choice=choice, tuned_us=9.0, model_us=10.0)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the shipped table of GPU lies; there is none yet."""
    monkeypatch.setattr(table, "SHIPPED_TABLES", tmp_path / "shipped")
    return table.shipped_table_path(GPU)


def test_without_tables_the_model_decides(shipped: Path):
    assert look_up(CONFIG, 8, GPU) is None
    assert not is_tuned(CONFIG, 8, GPU)


def test_the_users_table_comes_before_the_shipped_one(shipped: Path):
    merge_into(shipped, GPU, [entry(8, SHIPPED), entry(16, SHIPPED)])
    merge_into(user_table_path(GPU), GPU, [entry(8, USERS), entry(32, TuningChoice())])
    assert [look_up(CONFIG, num_tokens, GPU) for num_tokens in (8, 16, 32, 64)] == [
        USERS,
        SHIPPED,
        TuningChoice(),
        None,
    ]
    assert [is_tuned(CONFIG, bucket, GPU) for bucket in (8, 16, 32, 64)] == [True, True, True, False]


def test_a_users_entry_for_the_model_hides_the_shipped_choice(shipped: Path):
    merge_into(shipped, GPU, [entry(8, SHIPPED)])
    merge_into(user_table_path(GPU), GPU, [entry(8, TuningChoice())])
    assert look_up(CONFIG, 8, GPU) == TuningChoice()


@pytest.mark.parametrize("num_tokens", [5, 7, 8])
def test_an_entry_holds_for_every_count_of_its_bucket(num_tokens: int):
    remember(GPU, [entry(8, USERS)])
    assert look_up(CONFIG, num_tokens, GPU) == USERS


@pytest.mark.parametrize("num_tokens", [4, 9, 131073])
def test_an_entry_holds_for_no_count_of_another_bucket(num_tokens: int):
    remember(GPU, [entry(8, USERS)])
    assert look_up(CONFIG, num_tokens, GPU) is None


def test_layers_and_gpus_have_choices_of_their_own():
    remember(GPU, [entry(8, USERS)])
    other_layer = MoEConfig.create(hidden_size=512, intermediate_size=128, num_experts=16, top_k=4)
    other_gpu = GpuModel(**dict(GPU) | {"name": "Other GPU"})
    assert look_up(other_layer, 8, GPU) is None
    assert look_up(CONFIG, 8, other_gpu) is None


def test_what_is_remembered_counts_at_once_and_in_the_next_process():
    assert look_up(CONFIG, 8, GPU) is None
    remember(GPU, [entry(8, USERS)])
    assert look_up(CONFIG, 8, GPU) == USERS
    forget_tables()
    assert look_up(CONFIG, 8, GPU) == USERS


def test_what_cannot_be_written_counts_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        remember(GPU, [entry(8, USERS)])
    with pytest.warns(UserWarning, match="cannot be written"):
        remember(GPU, [entry(16, USERS)])
    assert [look_up(CONFIG, num_tokens, GPU) for num_tokens in (8, 16)] == [USERS, USERS]


def test_tables_are_read_once(monkeypatch: pytest.MonkeyPatch):
    reads: list[Path] = []

    def load(path: Path, gpu: GpuModel, **options: object) -> None:
        reads.append(path)

    monkeypatch.setattr(lookup, "load_table", load)
    for num_tokens in (1, 8, 100):
        look_up(CONFIG, num_tokens, GPU)
    assert len(reads) == len(set(reads)) == 2
    forget_tables()
    look_up(CONFIG, 1, GPU)
    assert len(reads) == 4


def test_a_bad_users_table_warns_once_and_the_shipped_one_counts(shipped: Path):
    merge_into(shipped, GPU, [entry(8, SHIPPED)])
    path = user_table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="is not used") as caught:
        choices = [look_up(CONFIG, 8, GPU) for _ in range(2)]
    assert choices == [SHIPPED, SHIPPED]
    assert len(caught) == 1


def test_a_shipped_table_that_does_not_hold_says_nothing(shipped: Path):
    shipped.parent.mkdir()
    shipped.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look_up(CONFIG, 8, GPU) is None


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["text", "device"])
def test_on_a_cpu_no_table_is_read(device: torch.device | str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lookup, "load_table", None)  # calling it would raise
    assert look_up(CONFIG, 8, device) is None
