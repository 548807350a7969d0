"""Kept Triton kernels: what goes by the kept handle, what goes the normal way, and that both write the same."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import threading
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter, so nothing is kept", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs

import moe
from moe.runtime import tensor_maps, triton_versions
from moe.runtime.tensor_maps import Boxes
from moe.runtime.triton_launch import TritonKernel

BLOCK = 64
IS_3_6 = triton.__version__.startswith("3.6.")
KNOWN_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))


@triton.jit(do_not_specialize=["num_values"])
def scale_kernel(values_ptr, scale_ptr, num_values, factor, BLOCK: tl.constexpr, num_warps: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_values = index < num_values
    value = tl.load(values_ptr + index, mask=in_values).to(tl.float32) * factor
    if scale_ptr is not None:
        value *= tl.load(scale_ptr)
    tl.store(values_ptr + index, value.to(values_ptr.dtype.element_ty), mask=in_values)


class FakeCompiled:
    """What the normal way returns: a handle that notes what it was given."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.function = "function"
        self.packed_metadata = "metadata"

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class FakeKernel:
    """A jitted function of two parameters that change and two that do not."""

    arg_names = ("values_ptr", "scale_ptr", "BLOCK", "num_warps")

    def __init__(self, compiled: Any = FakeCompiled) -> None:
        self.pre_run_hooks: list[Any] = []
        self.make_compiled = compiled
        self.compiled: list[Any] = []
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **fixed: Any) -> Any:
            self.options = fixed
            self.compiled.append(self.make_compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def device_index(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """CPU tensors that say that they lie on a GPU; `current` is what torch's current device is."""
    state = {"tensors": 0, "current": 0}

    class OnDevice:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, state["current"] = state["current"], self.index

        def __exit__(self, *_: object) -> None:
            state["current"] = self.before

    monkeypatch.setattr(Tensor, "get_device", lambda _: state["tensors"])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state["current"], raising=False)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    return state


def kept(kernel: FakeKernel) -> TritonKernel:
    return TritonKernel(kernel, BLOCK=BLOCK, num_warps=4, launch_pdl=True)


def test_the_first_launch_goes_the_normal_way_and_the_next_by_the_handle(device_index):
    kernel, values = FakeKernel(), torch.zeros(8)
    launches = kept(kernel)
    launches.launch((3, 2, 1), values, None)
    (compiled,) = kernel.compiled
    assert compiled.runs == []
    launches.launch((5, 2, 1), values, None)
    hooks_and_metadata = (None, None, None)
    assert compiled.runs == [
        (5, 2, 1, 1000, "function", "metadata", *hooks_and_metadata, values.data_ptr(), None, BLOCK, 4)
    ]
    assert len(kernel.compiled) == 1


def test_other_dtypes_and_absent_tensors_are_kept_apart(device_index):
    kernel, values = FakeKernel(), torch.zeros(8)
    launches = kept(kernel)
    for tensors in ((values, None), (values.half(), None), (values, values)):
        for _ in range(2):
            launches.launch((1, 1, 1), *tensors)
    assert [len(compiled.runs) for compiled in kernel.compiled] == [1, 1, 1]


def test_numbers_that_triton_compiles_apart_are_kept_apart(device_index):
    kernel, values = FakeKernel(), torch.zeros(8)
    launches = kept(kernel)
    for number in (1, 32, 33, 1 << 40, 48, 35):
        launches.launch((1, 1, 1), values, numbers=(number,))
    assert [[run[-3] for run in compiled.runs] for compiled in kernel.compiled] == [[], [48], [35], []]


def test_each_device_has_its_own_handle_and_is_the_current_one_while_it_launches(device_index):
    kernel, values = FakeKernel(), torch.zeros(8)
    launches = kept(kernel)
    for index in (0, 1, 0, 1):
        device_index["tensors"] = index
        launches.launch((1, 1, 1), values, None)
    first, second = kernel.compiled
    assert [run[3] for run in first.runs + second.runs] == [1000, 1001]
    assert device_index["current"] == 0


def test_misaligned_pointers_are_kept_by_themselves(device_index):
    kernel, values = FakeKernel(), torch.zeros(8)
    launches = kept(kernel)
    tensors = [(values, values), (values[1:], values), (values, values[1:]), (values[1:], values[1:])]
    for _ in range(2):
        for pair in tensors:
            launches.launch((1, 1, 1), *pair)
    launches.launch((1, 1, 1), values[2:], values)  # alike for the compiler
    assert len(kernel.compiled) == len(tensors)
    assert [len(compiled.runs) for compiled in kernel.compiled] == [1, 2, 1, 1]


def test_tensors_on_the_cpu_go_the_normal_way(device_index):
    device_index["tensors"] = -1
    kernel = FakeKernel()
    for _ in range(2):
        kept(kernel).launch((1, 1, 1), torch.zeros(8), None)
    assert [compiled.runs for compiled in kernel.compiled] == [[], []]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_kernel_on_a_cpu_says_what_runs_there():
    kernel = TritonKernel(scale_kernel, factor=2.0, BLOCK=BLOCK, num_warps=1)
    with pytest.raises(ValueError, match="expected tensors on one CUDA device, got cpu; use the reference on a CPU"):
        kernel.launch((1, 1, 1), torch.zeros(8), None, numbers=(8,))


def count_calls(calls: list[int]) -> Any:
    return lambda *arguments, **more: calls.append(1)


@pytest.mark.parametrize("place", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks", "in_place_of_the_chain"])
def test_while_a_hook_is_installed_launches_go_the_normal_way(device_index, monkeypatch, place):
    kernel, values, hook = FakeKernel(), torch.zeros(8), count_calls([])
    launches = kept(kernel)
    launches.launch((1, 1, 1), values, None)
    with monkeypatch.context() as patch:
        if place == "pre_run_hooks":
            patch.setattr(kernel, "pre_run_hooks", [hook])
        elif place == "in_place_of_the_chain":
            patch.setattr(knobs.runtime, "launch_enter_hook", hook)
        else:
            patch.setattr(getattr(knobs.runtime, place), "calls", [hook])
        launches.launch((1, 1, 1), values, None)
        assert len(kernel.compiled) == 2
    launches.launch((1, 1, 1), values, None)
    assert [len(compiled.runs) for compiled in kernel.compiled] == [1, 0]


def test_a_release_of_triton_without_these_handles_goes_the_normal_way(device_index):
    kernel = FakeKernel(compiled=object)
    launches = kept(kernel)
    for _ in range(3):
        launches.launch((1, 1, 1), torch.zeros(8), None)
    assert len(kernel.compiled) == 3


def test_tritons_compiled_kernels_have_the_handles_that_are_kept(monkeypatch):
    """The real thing up to the launcher, on a driver that is none: the fifth and sixth arguments and the kernel's own."""
    from emulation.offline_driver import _OfflineDriver, offline_gpu

    seen = []

    def launcher_cls(self: Any, source: Any, metadata: Any) -> Any:
        return lambda *arguments: seen.append(arguments)

    monkeypatch.setattr(_OfflineDriver, "launcher_cls", launcher_cls)
    values = torch.zeros(BLOCK, dtype=torch.float16)
    launches = TritonKernel(scale_kernel, num_values=BLOCK, factor=2.0, BLOCK=BLOCK, num_warps=2)
    with offline_gpu(90):
        monkeypatch.setattr(Tensor, "get_device", lambda _: 0)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        for _ in range(2):
            launches.launch((4, 1, 1), values, None)
    normal, by_handle = seen
    assert by_handle[:6] == normal[:6]
    assert len(by_handle) == len(normal)
    assert [value.data_ptr() if isinstance(value, Tensor) else value for value in normal[9:]] == list(by_handle[9:])


class CudaLauncher:
    """Named and made as Triton makes what `CompiledKernel.run` is."""

    launch_cooperative_grid, launch_pdl = False, True
    profile_scratch_size = 0
    arg_annotations, kernel_signature = "annotations", "signature"  # 3.7's

    def __init__(self, scratch_bytes: int) -> None:
        self.global_scratch_size = scratch_bytes
        self.direct: list[tuple[Any, ...]] = []
        self.called: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        self.direct.append(arguments)

    def __call__(self, *arguments: Any) -> None:
        self.called.append(arguments)


@pytest.mark.parametrize(
    ("release", "scratch_bytes", "is_direct"),
    [(release, *case) for release in KNOWN_RELEASES for case in ((0, True), (8, False))],
)
def test_the_launcher_is_passed_by_only_where_it_is_known_and_makes_no_memory(
    device_index, monkeypatch, release, scratch_bytes, is_direct
):
    monkeypatch.setattr(triton_versions, "RELEASE", release)
    launcher = CudaLauncher(scratch_bytes)
    compiled = types.SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")
    launches, values = kept(FakeKernel(compiled=lambda: compiled)), torch.zeros(8)
    for _ in range(2):
        launches.launch((3, 2, 1), values, None)
    start, hooks, scratch = (3, 2, 1, 1000, "function"), (None, None, None), (None, None)
    arguments = (values.data_ptr(), None, BLOCK, 4)
    if not is_direct:
        assert (launcher.direct, launcher.called) == ([], [(*start, "metadata", *hooks, *arguments)])
    elif release == (3, 6):
        expected = (*start, False, True, *scratch, "metadata", *hooks, *arguments)
        assert (launcher.direct, launcher.called) == ([expected], [])
    else:
        expected = (*start, False, True, "metadata", *hooks, *scratch, "annotations", "signature", arguments)
        assert (launcher.direct, launcher.called) == ([expected], [])


def test_code_stays_loaded_while_its_handle_is_kept(device_index):
    """Triton unloads what it compiled when nothing holds it, from 3.8 on, and its own cache may come to hold another's copy."""
    launcher = CudaLauncher(0)

    class Compiled:
        run, function, packed_metadata = launcher, "function", "metadata"

    kernel = FakeKernel(compiled=Compiled)
    launches = kept(kernel)
    launches.launch((1, 1, 1), torch.zeros(8), None)
    held = weakref.ref(kernel.compiled.pop())
    gc.collect()
    assert held() is not None
    launches.launch((1, 1, 1), torch.zeros(8), None)
    assert (len(launcher.direct), kernel.compiled) == (1, [])


def test_fused_multiply_adds_are_asked_for(device_index):
    kernel = FakeKernel()
    kept(kernel).launch((1, 1, 1), torch.zeros(8), None)
    assert kernel.options == {"BLOCK": BLOCK, "num_warps": 4, "launch_pdl": True, "enable_fp_fusion": True}


@pytest.mark.skipif(max(KNOWN_RELEASES) < triton_versions.RELEASE, reason="fuses where asked only")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_fused_multiply_adds_are_what_the_releases_give_by_themselves():
    from emulation.offline_compile import compile_kernel

    signature = {"values_ptr": "*fp32", "scale_ptr": "*fp32", "num_values": "i32", "factor": "fp32"}
    constants = {"BLOCK": BLOCK, "num_warps": 4}
    signature |= dict.fromkeys(constants, "constexpr")
    default, fused, apart = (
        compile_kernel(scale_kernel, signature, constants, 90, num_warps=4, **options).ptx
        for options in ({}, {"enable_fp_fusion": True}, {"enable_fp_fusion": False})
    )
    assert default == fused
    assert fused != apart


@pytest.fixture
def unknown_release(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Triton that is newer than any that was known when this was written."""
    monkeypatch.setattr(triton_versions, "RELEASE", (3, 10))
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    triton_versions.warn_that_hopper_steps_aside.cache_clear()
    yield
    triton_versions.warn_that_hopper_steps_aside.cache_clear()


def test_with_an_unknown_release_every_launch_goes_the_normal_way_and_one_warning_says_so(
    device_index, unknown_release
):
    kernels = [FakeKernel(compiled=object), FakeKernel()]

    def launch_all() -> None:
        for kernel in kernels:
            launches = kept(kernel)
            for _ in range(3):
                launches.launch((1, 1, 1), torch.zeros(8), None)

    with pytest.warns(RuntimeWarning) as caught:
        launch_all()
    assert [len(kernel.compiled) for kernel in kernels] == [3, 3]
    (warning,) = caught
    assert str(warning.message).startswith("triton: expected 3.6 to 3.9, got 3.10.1; ")


def test_with_an_unknown_release_boxes_reach_the_launcher_as_descriptors(launched, copying, unknown_release):
    source, target = torch.zeros(64, 128).bfloat16(), torch.zeros(64, 128).bfloat16()

    def launch() -> None:
        copying.launch((4, 1, 1), boxes_of(source, 16, 64), boxes_of(target, 16, 64), source, numbers=(5,))

    with pytest.warns(RuntimeWarning, match=r"got 3\.10\.1"):
        launch()
    launch()
    launch()
    first, *others = map(launcher_arguments, launched.launches)
    assert others == [first, first]


@pytest.mark.parametrize(
    ("version", "release"),
    [("3.6.0", (3, 6)), ("3.10.0", (3, 10)), ("3.9.0+git1a2b", (3, 9)), ("4.0.0.dev1", (4, 0)), ("main", (0, 0))],
)
def test_a_release_is_read_off_a_version(version, release):
    assert triton_versions._release_of(version) == release


def boxes_of(matrix: Tensor, *box: int) -> Boxes:
    from moe.gemm.hopper.boxes import box_layout

    return Boxes(matrix, tuple(matrix.shape), matrix.stride(), box, box_layout(*box))


def as_passed(arguments: Sequence[Any]) -> list[Any]:
    """Arguments of a launcher, tensors by their address."""
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]


class GeneratedLauncher(CudaLauncher):
    """As Triton makes it of a kernel with descriptors: around the wrapper, its own, that makes maps of them."""

    global_scratch_size = 0
    launches: ClassVar[list[list[Any]]] = []  # by all of them: Triton keeps a compiled kernel, and with it the launcher

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        self.launch = wrap_handle_tensordesc(self.generated, source.signature, metadata.tensordesc_meta)

    def generated(self, *arguments: Any) -> None:
        """Notes arguments in the order that 3.6 has them in."""
        if not IS_3_6:
            *base, _, _, of_kernel = arguments
            arguments = (*base[:7], *base[11:13], *base[7:11], *of_kernel)
        self.launches.append(as_passed(arguments))

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
        first = (x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl)
        if IS_3_6:
            self.launch(*first, None, None, *arguments)
        else:
            base = (*arguments[:4], None, None, self.arg_annotations, self.kernel_signature)
            self.launch(*first, *base, arguments[4:])


GeneratedLauncher.__name__ = "CudaLauncher"


@pytest.fixture
def launched(device_index, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """What reaches the generated launcher, and which maps were made, on a driver that compiles for Hopper."""
    from emulation.offline_driver import _OfflineDriver, _Utils, offline_gpu

    seen = types.SimpleNamespace(launches=GeneratedLauncher.launches, maps=[])

    def fill_tma_descriptor(self: Any, *arguments: Any) -> str:
        seen.maps.append(arguments)
        return f"map of {arguments}"

    monkeypatch.setattr(_OfflineDriver, "launcher_cls", lambda self, *arguments: GeneratedLauncher(*arguments))
    monkeypatch.setattr(_OfflineDriver, "get_current_stream", lambda self, device: 1000)
    name = "fill_tma_descriptor" if IS_3_6 else "fill_tma_descriptor_tiled"
    monkeypatch.setattr(_Utils, name, fill_tma_descriptor, raising=False)
    with offline_gpu(90):
        yield seen
    seen.launches.clear()


@pytest.fixture
def copying() -> TritonKernel:
    from boxes_kernel import copy_boxes_kernel

    return TritonKernel(copy_boxes_kernel, BOX_ROWS=16, num_warps=4)


def launcher_arguments(launch: list[Any]) -> list[Any]:
    """All but what Triton passes for hooks: they are given the launch's metadata, of which kept launches have none."""
    return launch[:10] + launch[13:]


def test_boxes_reach_the_launcher_as_the_descriptors_of_the_normal_way_do(launched, copying):
    source, target = torch.zeros(64, 128).bfloat16(), torch.zeros(64, 128).bfloat16()
    for _ in range(3):
        copying.launch((4, 1, 1), boxes_of(source, 16, 64), boxes_of(target, 16, 64), source, numbers=(5,))
    normal, *kept_launches = map(launcher_arguments, launched.launches)
    assert any(str(value).startswith("map of") for value in normal)
    assert kept_launches == [normal, normal]
    assert len(launched.maps) == 4  # two the normal way, two that are kept


def test_a_map_is_made_for_each_address_and_shape(launched, copying):
    memory = torch.zeros(64, 256).bfloat16()
    target = memory.new_zeros(64, 128)
    matrices = [memory[:32].view(64, 128), memory[32:].view(64, 128), memory[:32].view(32, 256)]
    for _ in range(2):
        for matrix in matrices:
            copying.launch((4, 1, 1), boxes_of(matrix, 16, 64), boxes_of(target, 16, 64), memory, numbers=(5,))
    sources = [arguments for arguments in launched.maps[2:] if arguments[0] != target.data_ptr()]
    assert [(address, tuple(shape)) for address, *_, shape, _, _ in sources] == [
        (matrix.data_ptr(), tuple(matrix.shape)) for matrix in (matrices[1], matrices[2], matrices[0])
    ]
    for launch, matrix in zip(launched.launches[3:], matrices, strict=True):
        assert [launch[14:16], launch[16:18]] == [list(matrix.shape), list(matrix.stride())]
        assert str(matrix.data_ptr()) in launch[13]


def test_boxes_of_halves_begin_where_views_of_them_would(launched, copying):
    from moe.gemm.hopper.boxes import half_row_boxes

    memory, target = torch.zeros(64, 256).bfloat16(), torch.zeros(64, 128).bfloat16()
    views = memory.chunk(2, dim=1)
    for _ in range(2):
        for half, view in zip(half_row_boxes(memory, 16, 64), views, strict=True):
            assert half.data_ptr() == view.data_ptr()
            copying.launch((4, 1, 1), half, boxes_of(target, 16, 64), memory, numbers=(5,))
            assert [half.shape, half.strides] == [tuple(view.shape), view.stride()]
    made = [arguments[0] for arguments in launched.maps if arguments[0] != target.data_ptr()]
    assert made == [views[0].data_ptr(), views[1].data_ptr(), views[0].data_ptr()]  # the first the normal way


def test_maps_hold_no_memory(launched, copying):
    source, target = torch.zeros(64, 128).bfloat16(), torch.zeros(64, 128).bfloat16()
    for _ in range(2):
        copying.launch((4, 1, 1), boxes_of(source, 16, 64), boxes_of(target, 16, 64), source, numbers=(5,))
    launched.launches.clear()
    watched = weakref.ref(source)
    del source
    gc.collect()
    assert watched() is None


def test_so_many_maps_are_kept_and_no_more(launched, copying, monkeypatch):
    monkeypatch.setattr(tensor_maps, "MAX_KEPT_MAPS", 4)
    memory = torch.zeros(8, 64, 128).bfloat16()
    for _ in range(2):
        for matrix in memory:
            copying.launch((4, 1, 1), boxes_of(matrix, 16, 64), boxes_of(memory[0], 16, 64), memory, numbers=(5,))
            assert str(matrix.data_ptr()) in launched.launches[-1][13]
    (handle,) = copying._kept.values()
    assert 0 < len(handle.passed.__self__.kept) <= 4


@pytest.mark.parametrize("difference", ["maker", "launcher", "metadata"])
def test_where_the_launcher_is_not_as_known_descriptors_are_made_for_each_launch(
    launched, copying, monkeypatch, difference
):
    missing = {"maker": "make_tensordesc_arg", "launcher": "launcher", "metadata": "tensordesc_meta"}[difference]
    real = inspect.getclosurevars

    def without(variables: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in variables.items() if name != missing}

    def closurevars(function: Any) -> Any:
        found = real(function)
        return found._replace(nonlocals=without(found.nonlocals), globals=without(found.globals))

    monkeypatch.setattr(inspect, "getclosurevars", closurevars)
    source, target = torch.zeros(64, 128).bfloat16(), torch.zeros(64, 128).bfloat16()
    for _ in range(3):
        copying.launch((4, 1, 1), boxes_of(source, 16, 64), boxes_of(target, 16, 64), source, numbers=(5,))
    normal, *kept_launches = map(launcher_arguments, launched.launches)
    assert kept_launches == [normal, normal]
    assert len(launched.maps) == 6


def scaled(values: Tensor, launches: TritonKernel, scale: Tensor | None = None) -> Tensor:
    values = values.clone()
    launches.launch((-(-values.numel() // BLOCK), 1, 1), values, scale)
    return values


@pytest.fixture
def halving() -> TritonKernel:
    return TritonKernel(scale_kernel, num_values=130, factor=0.5, BLOCK=BLOCK, num_warps=2)


def test_a_kept_launch_writes_what_the_normal_one_does(cuda, halving):
    values = torch.arange(200, device=cuda, dtype=torch.float32)
    expected = values.clone()
    expected[:130] /= 2
    for scale in (None, torch.ones(1, device=cuda)):
        for dtype in (torch.float32, torch.bfloat16):
            for _ in range(3):
                assert torch.equal(scaled(values.to(dtype), halving, scale), expected.to(dtype))
    assert len(halving._kept) == 4


def test_boxes_are_copied_by_kept_maps_wherever_a_matrix_lies(cuda, copying):
    if torch.cuda.get_device_capability(cuda)[0] < 9:
        pytest.skip("no TMA unit here")
    memory, written = torch.randn(3, 64, 64, device=cuda).bfloat16(), torch.zeros(4, dtype=torch.int32, device=cuda)
    for number in range(3):
        for source in memory:
            target = torch.full_like(source, float("nan"))
            boxes = (boxes_of(matrix, 16, 64) for matrix in (source, target))
            copying.launch((4, 1, 1), *boxes, written, numbers=(number,))
            assert torch.equal(target, source)
            assert written.tolist() == [number] * 4


def test_a_misaligned_tensor_is_scaled_too(cuda, halving):
    values = torch.ones(201, device=cuda)
    scaled(values, halving)
    halving.launch((3, 1, 1), values[1:], None)
    expected = torch.ones(201)
    expected[1:131] = 0.5
    assert torch.equal(values.cpu(), expected)


def test_a_kept_launch_into_a_capture_is_replayed(cuda, halving):
    values = torch.ones(130, device=cuda)
    halving.launch((3, 1, 1), values, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        halving.launch((3, 1, 1), values, None)
    for _ in range(3):
        graph.replay()
    assert (values == 1 / 16).all()


def test_a_kept_launch_runs_on_the_current_stream(cuda, halving):
    values = torch.ones(130, device=cuda)
    halving.launch((3, 1, 1), values, None)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        values.fill_(8)
        halving.launch((3, 1, 1), values, None)
    stream.synchronize()
    assert (values == 4).all()


def test_a_launch_hook_sees_kept_kernels(cuda, halving):
    values, names = torch.ones(130, device=cuda), []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    halving.launch((3, 1, 1), values, None)
    knobs.runtime.launch_enter_hook.add(note)
    try:
        halving.launch((3, 1, 1), values, None)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    halving.launch((3, 1, 1), values, None)
    assert names == ["scale_kernel"]
    assert (values == 1 / 8).all()


def test_a_thread_that_never_used_the_gpu_launches(cuda, halving):
    values = torch.ones(130, device=cuda)
    halving.launch((3, 1, 1), values, None)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: halving.launch((3, 1, 1), values, None))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert (values == 1 / 4).all()


def test_each_gpu_runs_its_own_kernel(cuda, halving):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    for _ in range(2):
        for index in (0, 1):
            values = torch.ones(130, device=f"cuda:{index}")
            assert (scaled(values, halving) == 0.5).all()
    assert {key[0] for key in halving._kept} == {0, 1}


@pytest.mark.parametrize("has_swiglu", [False, True], ids=["plain", "swiglu"])
def test_the_stages_write_the_same_by_kept_kernels_as_the_normal_way(cuda, has_swiglu):
    config = moe.MoEConfig.create(hidden_size=264, intermediate_size=136, num_experts=6, top_k=3)
    pipeline = dataclasses.replace(moe.build_pipeline(config, cuda), fused=None)
    generator = torch.Generator(cuda).manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=cuda)

    logits, hidden_states = draw(37, 6), draw(37, 264).bfloat16()
    weights = [(draw(*gemm.weight_shape) / 16).bfloat16() for gemm in (config.gemm1, config.gemm2)]
    swiglu = moe.SwigluParams(alpha=draw(6)) if has_swiglu else None

    def run() -> Tensor:
        return pipeline(logits, hidden_states, *weights, swiglu=swiglu)

    knobs.runtime.launch_enter_hook.add(nothing)
    try:
        expected = run()
    finally:
        knobs.runtime.launch_enter_hook.remove(nothing)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(run(), expected)


def nothing(metadata: Any) -> None: ...


@pytest.mark.parametrize("release", KNOWN_RELEASES)
def test_each_known_release_says_how_many_registers_streaming_takes(monkeypatch, release):
    monkeypatch.setattr(triton_versions, "RELEASE", release)
    is_said = release >= (3, 8)  # before, ptxas keeps loads in flight unasked
    assert [limit is not None for limit in triton_versions.streaming_registers()] == [is_said] * 2


def test_an_unknown_release_takes_as_many_registers_as_the_newest_known(monkeypatch):
    monkeypatch.setattr(triton_versions, "RELEASE", max(KNOWN_RELEASES))
    newest = triton_versions.streaming_registers()
    monkeypatch.setattr(triton_versions, "RELEASE", (3, 10))
    assert triton_versions.streaming_registers() == newest
