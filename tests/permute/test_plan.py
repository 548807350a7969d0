"""Where each slot goes: the kernels against the reference, and the reference against lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permute.stage import Stage
from torch import Tensor

from moe.flow import Permutation, TopK, UnitSize
from moe.permute.config import PermuteConfig
from moe.permute.reference import plan_permutation_reference

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def config_of(num_experts: int, top_k: int, **fields: int) -> PermuteConfig:
    return PermuteConfig(**{"num_experts": num_experts, "num_local_experts": num_experts, "top_k": top_k, **fields})


def topk_of(expert_ids: Tensor) -> TopK:
    return TopK(expert_ids.to(torch.int32), torch.ones(expert_ids.shape, device=expert_ids.device))


def random_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device, *, low: int = -1) -> Tensor:
    """Ids in [low, num_experts], duplicates in a row included: by default one too low and one too high."""
    generator = torch.Generator(device=device).manual_seed(num_tokens + top_k)
    shape = (num_tokens, top_k)
    return torch.randint(low, num_experts + 1, shape, generator=generator, device=device, dtype=torch.int32)


def lists_of(permutation: Permutation) -> dict[str, list[int] | int]:
    """The defined part of a permutation."""
    num_rows, num_tiles = int(permutation.num_rows), int(permutation.num_tiles)
    return {
        "tile_rows": permutation.tile_rows,
        "num_rows": num_rows,
        "num_tiles": num_tiles,
        "row_of_slot": permutation.row_of_slot.flatten().tolist(),
        "token_of_row": permutation.token_of_row[:num_rows].tolist(),
        "expert_of_tile": permutation.expert_of_tile[:num_tiles].tolist(),
        "row_limit_of_tile": permutation.row_limit_of_tile[:num_tiles].tolist(),
    }


def lists_by_hand(expert_ids: list[list[int]], config: PermuteConfig) -> dict[str, list[int] | int]:
    """The same from the definition, one expert after another."""
    tile_rows = config.rows_per_tile(len(expert_ids))
    flat_ids = [expert_id for row in expert_ids for expert_id in row]
    row_of_slot = [-1] * len(flat_ids)
    token_of_row: list[int] = []
    expert_of_tile: list[int] = []
    row_limit_of_tile: list[int] = []
    for local_id in range(config.num_local_experts):
        slots = [slot for slot, expert_id in enumerate(flat_ids) if expert_id == config.local_expert_offset + local_id]
        num_tiles = -(-len(slots) // tile_rows)
        expert_of_tile += [local_id] * num_tiles
        row_limit_of_tile += [len(token_of_row) + len(slots)] * num_tiles
        for slot in slots:
            row_of_slot[slot] = len(token_of_row)
            token_of_row.append(slot // config.top_k)
        token_of_row += [-1] * (num_tiles * tile_rows - len(slots))
    return {
        "tile_rows": tile_rows,
        "num_rows": len(token_of_row),
        "num_tiles": len(expert_of_tile),
        "row_of_slot": row_of_slot,
        "token_of_row": token_of_row,
        "expert_of_tile": expert_of_tile,
        "row_limit_of_tile": row_limit_of_tile,
    }


def assert_same(actual: Permutation, expected: Permutation) -> None:
    assert (actual.tile_rows, actual.mean_rows) == (expected.tile_rows, expected.mean_rows)
    num_rows, num_tiles = int(expected.num_rows), int(expected.num_tiles)
    assert (int(actual.num_rows), int(actual.num_tiles)) == (num_rows, num_tiles)
    for name, num_defined in (
        ("row_of_slot", None),
        ("token_of_row", num_rows),
        ("expert_of_tile", num_tiles),
        ("row_limit_of_tile", num_tiles),
    ):
        got, wanted = getattr(actual, name), getattr(expected, name)
        assert (got.shape, got.dtype, wanted.dtype) == (wanted.shape, torch.int32, torch.int32), name
        differs = (got[:num_defined].cpu() != wanted[:num_defined].cpu()).nonzero()
        assert not len(differs), f"{name}: {len(differs)} entries differ, the first at {differs[0].tolist()}"


def assert_agrees(planner: Stage, expert_ids: Tensor, config: PermuteConfig) -> None:
    topk = topk_of(expert_ids)
    assert_same(planner.run(topk, config=config), plan_permutation_reference(topk, config=config))


@contextmanager
def chunking_with(module: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: int) -> Iterator[None]:
    """A planner whose slots are cut otherwise; what it keeps of loads is forgotten before and after."""
    monkeypatch.setattr(module, "CHUNKING", replace(module.CHUNKING, **changes))
    forget = module._load_of.cache_clear if hasattr(module, "_load_of") else lambda: None
    forget()
    yield
    forget()


@pytest.fixture(params=["one_launch", "several_launches", "several_launches_of_long_chunks"])
def launches(planner: Stage, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways of planning at every size, by small blocks, and chunks that take several rounds of a block."""
    module = sys.modules[planner.run.__module__]
    changes = {}
    if module.__name__.endswith("numba_plan"):
        changes["block_slots"] = 64
        monkeypatch.setattr(module, "WARPS", 2)
        monkeypatch.setattr(module, "FEW_WARPS", 1)
    if request.param != "one_launch":
        changes["max_slots_in_one_launch"] = 0
    if request.param == "several_launches_of_long_chunks":
        changes["max_chunks"] = 2
    with chunking_with(module, monkeypatch, **changes):
        yield


def test_example_of_the_docstring(plan) -> None:
    # The config refuses tiles of two rows, too few for a tensor core.
    config = PermuteConfig.model_construct(
        num_experts=3, num_local_experts=3, top_k=2, local_expert_offset=0, tile_rows=2
    )
    expert_ids = torch.tensor([[2, 0], [2, 1]], device=plan.device)
    assert lists_of(plan.run(topk_of(expert_ids), config=config)) == {
        "tile_rows": 2,
        "num_rows": 6,
        "num_tiles": 3,
        "row_of_slot": [4, 0, 5, 2],
        "token_of_row": [0, -1, 1, -1, 0, 1],
        "expert_of_tile": [0, 1, 2],
        "row_limit_of_tile": [1, 3, 6],
    }


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_reference_follows_the_definition(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 20))
    num_local = data.draw(st.integers(1, num_experts))
    top_k = data.draw(st.integers(1, 5))
    config = config_of(
        num_experts,
        top_k,
        num_local_experts=num_local,
        local_expert_offset=data.draw(st.integers(0, num_experts - num_local)),
        tile_rows=data.draw(st.sampled_from([None, 16, 32, 64, 128])),
    )
    expert_id = st.one_of(st.integers(-1, num_experts), st.sampled_from([INT32_MIN, INT32_MAX]))
    rows = data.draw(st.lists(st.lists(expert_id, min_size=top_k, max_size=top_k), max_size=40))
    expert_ids = torch.tensor(rows, dtype=torch.int32).view(len(rows), top_k)
    permutation = plan_permutation_reference(topk_of(expert_ids), config=config)
    assert lists_of(permutation) == lists_by_hand(rows, config)
    assert permutation.mean_rows == config.mean_rows(len(rows))
    assert int(permutation.num_rows) <= permutation.max_rows == config.max_rows(len(rows))


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [(1, 1, 1), (1, 8, 256), (7, 2, 3), (7, 32, 257), (64, 8, 13), (64, 8, 128), (33, 1, 2048), (99, 8, 8)],
    ids=lambda value: str(value),
)
def test_kernel_agrees_with_the_reference(num_tokens, top_k, num_experts, launches, poisoned_memory, planner) -> None:
    assert_agrees(planner, random_ids(num_tokens, num_experts, top_k, planner.device), config_of(num_experts, top_k))


def test_both_sides_of_the_one_launch_border_agree(poisoned_memory, planner, monkeypatch) -> None:
    module = sys.modules[planner.run.__module__]
    # An emulation takes as long as there are slots, and any border is one.
    is_emulated = planner.device.type == "cpu"
    with chunking_with(module, monkeypatch, **({"max_slots_in_one_launch": 1024} if is_emulated else {})):
        border = module.CHUNKING.max_slots_in_one_launch // 32
        for num_tokens in (border, border + 1):
            assert_agrees(planner, random_ids(num_tokens, 256, 32, planner.device), config_of(256, 32))


def test_a_block_takes_rounds_where_not_all_of_its_warps_have_room_to_mark(poisoned_memory, numba_device) -> None:
    from moe.permute.numba_block import PlanBlock, Totals
    from moe.permute.numba_plan import FEW_WARPS, numba_plan_permutation

    planner = Stage(numba_plan_permutation, numba_device)
    assert PlanBlock(2048, FEW_WARPS, Totals.SLOTS).mark_rows < FEW_WARPS
    expert_ids = random_ids(25, 12, 8, numba_device)
    assert_agrees(planner, expert_ids, config_of(2048, 8))
    assert_agrees(planner, expert_ids * 186, config_of(2048, 8))


UNIT_CASES = {  # num_tokens, top_k, num_experts, tile_rows
    "few_rows_of_many": (64, 8, 128, 16),
    "several_units_an_expert": (64, 8, 5, 16),
    "several_groups_an_expert": (97, 8, 2, 16),
    "one_takes_all": (40, 8, 1, 16),
    "more_experts_than_threads": (16, 2, 300, 16),  # 64 threads: see `launches`
    "nobody": (7, 1, 3, 16),
}


@pytest.mark.parametrize("size", [UnitSize(16, 16, 22), UnitSize(40, 8, 3)], ids=["even", "ragged"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "tile_rows"), UNIT_CASES.values(), ids=UNIT_CASES)
def test_units_made_on_the_way_are_those_of_the_reference(
    num_tokens, top_k, num_experts, tile_rows, size, launches, poisoned_memory, numba_device
) -> None:
    from moe.gemm.hopper.work_units import plan_units_reference
    from moe.permute.numba_plan import numba_plan_permutation

    is_nobody = (num_tokens, num_experts) == (7, 3)
    ids = random_ids(num_tokens, -2 if is_nobody else num_experts, top_k, numba_device, low=-3 if is_nobody else -1)
    config = config_of(num_experts, top_k, tile_rows=tile_rows)
    asked = []

    def unit_size(*load):
        asked.append(load)
        return size

    permutation = numba_plan_permutation(topk_of(ids), config=config, unit_size=unit_size)
    on_cpu = {name: getattr(permutation, name).cpu() for name in ("num_tiles", "expert_of_tile", "row_limit_of_tile")}
    expected = plan_units_reference(replace(permutation, **on_cpu), size)
    num_units = int(expected.counts[0])
    assert (num_units > 0) != is_nobody
    assert asked == [(numba_device, tile_rows, config.mean_rows(num_tokens))]
    assert permutation.units.size == size
    assert permutation.units.counts.tolist() == [num_units, 0]
    assert torch.equal(permutation.units.records[:, :num_units].cpu(), expected.records[:, :num_units])


def test_more_experts_than_fit_in_shared_memory_are_refused(numba_device) -> None:
    from moe.permute.numba_plan import numba_plan_permutation, takes

    topk = topk_of(torch.zeros(3, 2, device=numba_device))
    assert takes(config_of(4096, 2, num_local_experts=2048))
    with pytest.raises(ValueError, match="expected num_local_experts <= 2048, got num_local_experts=2049"):
        numba_plan_permutation(topk, config=config_of(2049, 2))


def test_slices_share_the_slots_among_them(poisoned_memory, planner) -> None:
    expert_ids = random_ids(29, 13, 3, planner.device)
    num_owners = torch.zeros_like(expert_ids)
    for offset, num_local in [(0, 4), (4, 1), (5, 6), (11, 2)]:
        config = config_of(13, 3, num_local_experts=num_local, local_expert_offset=offset)
        assert_agrees(planner, expert_ids, config)
        num_owners += planner.run(topk_of(expert_ids), config=config).row_of_slot >= 0
    assert torch.equal(num_owners.bool(), (expert_ids >= 0) & (expert_ids < 13))
    assert int(num_owners.max()) == 1


@pytest.mark.parametrize("offset", range(10))
def test_kernel_agrees_at_every_offset_of_a_slice(offset, poisoned_memory, planner) -> None:
    config = config_of(13, 3, num_local_experts=4, local_expert_offset=offset)
    assert_agrees(planner, random_ids(29, 13, 3, planner.device), config)


@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_kernel_agrees_at_every_tile_size(tile_rows, launches, poisoned_memory, planner) -> None:
    config = config_of(5, 4, tile_rows=tile_rows)
    assert_agrees(planner, random_ids(130, 5, 4, planner.device), config)


@pytest.mark.parametrize("num_slots", [127, 128, 129, 256, 257])
def test_one_expert_may_take_all_slots(num_slots, launches, poisoned_memory, planner) -> None:
    config = config_of(13, 1, tile_rows=128)
    assert_agrees(planner, torch.full((num_slots, 1), 12, device=planner.device), config)


def test_no_slot_may_be_local(launches, poisoned_memory, planner) -> None:
    config = config_of(64, 2, num_local_experts=8, local_expert_offset=40)
    topk = topk_of(torch.arange(80, device=planner.device).view(40, 2) % 40)
    permutation = planner.run(topk, config=config)
    assert (int(permutation.num_rows), int(permutation.num_tiles)) == (0, 0)
    assert (permutation.row_of_slot == -1).all()


@pytest.mark.parametrize("offset", [0, 5])
def test_garbage_ids_get_no_row(offset, launches, poisoned_memory, planner) -> None:
    garbage = [INT32_MIN, INT32_MIN + 5, INT32_MIN + 6, -1, offset - 1, offset + 3, 8, 9, 257, INT32_MAX, INT32_MAX - 1]
    expert_ids = torch.tensor([[expert_id, offset + 1] for expert_id in garbage], device=planner.device)
    assert_agrees(planner, expert_ids, config_of(8, 2, num_local_experts=3, local_expert_offset=offset))


def test_every_occurrence_of_a_duplicate_counts(plan) -> None:
    config = config_of(4, 3, tile_rows=16)
    expert_ids = torch.tensor([[2, 2, 2], [0, 2, 0]], device=plan.device)
    permutation = plan.run(topk_of(expert_ids), config=config)
    assert permutation.row_of_slot.tolist() == [[16, 17, 18], [0, 19, 1]]
    assert permutation.token_of_row[16:20].tolist() == [0, 0, 0, 1]


def test_every_local_slot_has_a_row_of_its_own_that_names_its_token(plan) -> None:
    config = config_of(9, 4, num_local_experts=6, local_expert_offset=2)
    permutation = plan.run(topk_of(random_ids(50, 9, 4, plan.device)), config=config)
    token, choice = (permutation.row_of_slot >= 0).nonzero(as_tuple=True)
    row = permutation.row_of_slot[token, choice].long()
    assert torch.equal(permutation.token_of_row[row].long(), token)
    assert len(row.unique()) == len(row) == int((permutation.token_of_row[: int(permutation.num_rows)] >= 0).sum())


def test_no_tokens_give_empty_maps(plan, poisoned_memory) -> None:
    expert_ids = torch.zeros(0, 2, device=plan.device)
    permutation = plan.run(topk_of(expert_ids), config=config_of(8, 2))
    assert permutation.row_of_slot.shape == (0, 2)
    assert permutation.max_rows == permutation.max_tiles == 0
    assert permutation.num_rows.tolist() == permutation.num_tiles.tolist() == [0]
    assert permutation.num_rows.dtype == permutation.row_of_slot.dtype == torch.int32


def test_wrong_ids_and_weights_are_refused_alike(plan) -> None:
    expert_ids = torch.zeros(3, 2, dtype=torch.int64, device=plan.device)
    topk = TopK(expert_ids, torch.ones(3, 2, device=plan.device))
    with pytest.raises(ValueError, match="expert_indices must be int32"):
        plan.run(topk, config=config_of(8, 2))
    with pytest.raises(ValueError, match="expert_indices dim1 must match top_k"):
        plan.run(topk_of(expert_ids), config=config_of(8, 3))
    topk = TopK(expert_ids.int(), torch.ones(4, 2, device=plan.device))
    with pytest.raises(ValueError, match=r"expert_weights: expected \[T=3, K=2\], got \[4, 2\]"):
        plan.run(topk, config=config_of(8, 2))


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [
        *((32, 8, 256), (33, 8, 256), (128, 8, 512), (2048, 8, 256), (2049, 8, 256), (8192, 8, 256)),
        *((16384, 32, 2048), (1000003, 1, 13), (200000, 8, 257), (4096, 1, 2048), (8191, 2, 1024)),
    ],
    ids=lambda value: str(value),
)
def test_kernel_agrees_with_the_reference_at_full_size(
    num_tokens, top_k, num_experts, poisoned_memory, planner, cuda
) -> None:
    config = config_of(num_experts, top_k)
    assert_agrees(planner, random_ids(num_tokens, num_experts, top_k, cuda), config)
    assert_agrees(planner, torch.zeros(num_tokens, top_k, device=cuda), config)


@pytest.mark.parametrize("num_tokens", [300, 8192])
def test_twenty_runs_give_the_same_maps(num_tokens, planner, cuda) -> None:
    topk, config = topk_of(random_ids(num_tokens, 256, 8, cuda)), config_of(256, 8)
    first = planner.run(topk, config=config)
    for _ in range(19):
        assert_same(planner.run(topk, config=config), first)


@pytest.mark.parametrize("num_tokens", [3, 300, 2048])
def test_a_captured_plan_follows_new_ids(num_tokens, planner, cuda) -> None:
    topk, config = topk_of(random_ids(num_tokens, 64, 8, cuda)), config_of(64, 8)
    planner.run(topk, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        permutation = planner.run(topk, config=config)
    for shift in (1, 5):
        topk.expert_ids.add_(shift).remainder_(66)
        graph.replay()
        assert_same(permutation, plan_permutation_reference(topk, config=config))


def test_tensors_of_another_gpu_than_the_current_are_planned_there(planner, cuda) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    for num_tokens in (30, 3000):
        assert_agrees(planner, random_ids(num_tokens, 16, 4, other), config_of(16, 4))
