"""Expert ids of any integer type as int32, and through a map: in torch and in the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.expert_ids import ID_DTYPES, as_int32_ids, launch_map_ids, mapped_ids

Map = Callable[[Tensor, "Tensor | None", int], Tensor]


def in_torch(ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    return as_int32_ids(ids, num_experts) if expert_map is None else mapped_ids(ids, expert_map)


@pytest.fixture(params=["torch", pytest.param("kernel", marks=[pytest.mark.interpreter, pytest.mark.gpu])])
def way(request: pytest.FixtureRequest) -> tuple[Map, torch.device]:
    if request.param == "torch":
        return in_torch, torch.device("cpu")
    pytest.importorskip("triton")
    return launch_map_ids, request.getfixturevalue("triton_device")


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_ids_of_experts_stay_and_all_others_stay_none(dtype: torch.dtype, way: tuple[Map, torch.device]) -> None:
    run, device = way
    values = {
        0,
        4,
        5,
        6,
        127,
        torch.iinfo(dtype).max,
        torch.iinfo(dtype).min,
        torch.iinfo(dtype).max - 1,
        1 << 32,
        (1 << 32) + 3,
    }
    values = [value for value in sorted(values) if value <= torch.iinfo(dtype).max]
    mapped = run(torch.tensor([values], dtype=dtype, device=device), None, 6)
    assert mapped.dtype == torch.int32
    assert mapped.shape == (1, len(values))
    got = [value if 0 <= value < 6 else None for value in mapped[0].tolist()]
    assert got == [value if 0 <= value < 6 else None for value in values]


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_a_map_is_followed_by_ids_of_every_type(dtype: torch.dtype, way: tuple[Map, torch.device]) -> None:
    run, device = way
    expert_map = torch.tensor([3, -1, 0, -1, 3, 1], dtype=torch.int32, device=device)
    ids = torch.tensor([[0, 1], [5, torch.iinfo(dtype).max], [6, 2]], dtype=dtype, device=device)
    assert run(ids, expert_map, 6).tolist() == [[3, -1], [1, -1], [-1, 0]]


@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_map_that_is_no_range_is_followed(
    dtype: torch.dtype, map_dtype: torch.dtype, way: tuple[Map, torch.device]
) -> None:
    run, device = way
    expert_map = torch.tensor([3, -1, 0, -1, 3, 1], dtype=map_dtype, device=device)
    ids = torch.tensor([[0, 1], [2, 4], [5, -1], [2071690107, 6], [-1, -1], [-7, 3]], dtype=dtype, device=device)
    mapped = run(ids, expert_map, 6)
    assert mapped.dtype == torch.int32
    assert mapped.tolist() == [[3, -1], [0, 3], [1, -1], [-1, -1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 129])
def test_every_id_of_a_batch_is_mapped(num_tokens: int, way: tuple[Map, torch.device]) -> None:
    run, device = way
    ids = torch.arange(num_tokens * 3, device=device).view(num_tokens, 3) % 11
    mapped = run(ids, torch.arange(10, -1, -1, device=device), 11)
    assert torch.equal(mapped, (10 - ids).int())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32, torch.uint64], ids=str)
def test_wide_ids_and_ids_with_a_map_take_one_launch_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    ids = torch.tensor([[0, 1], [5, 6]], dtype=dtype, device=device)
    expert_map = torch.tensor([3, -1, 0, -1, 3, 1], dtype=torch.int32, device=device)
    for expected, expert_map_or_none in (([[0, 1], [5, -1]], None), ([[3, -1], [1, -1]], expert_map)):
        in_torch(ids, expert_map_or_none, 6)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            mapped = in_torch(ids, expert_map_or_none, 6)
            torch.cuda.synchronize()
        on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert [name for name in on_gpu if "Buffer Request" not in name] == ["map_ids_kernel"]
        assert mapped.tolist() == expected


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint64], ids=str)
def test_the_kernel_compiles_for_every_gpu(dtype: torch.dtype, has_map: bool, arch: int) -> None:
    pytest.importorskip("triton")
    from emulation.offline_driver import offline_gpu

    expert_map = torch.zeros(6, dtype=torch.int32) if has_map else None
    with offline_gpu(arch) as gpu:
        launch_map_ids(torch.zeros(33, 8, dtype=dtype), expert_map, 6)
    (launch,) = gpu.launches
    assert launch.grid == (2, 1, 1)
    assert launch.report.spill_bytes == 0
