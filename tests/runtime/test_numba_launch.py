"""Compiling and launching numba kernels: what is kept, what is refused, and in which words."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from moe.runtime import numba_launch
from moe.runtime.numba_launch import NumbaKernel

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
pytestmark = pytest.mark.skipif(IS_SIMULATED, reason="the simulator has no launcher")


def add_one_kernel() -> NumbaKernel:
    from numba import cuda

    def add_one(values_ptr, num_values):
        index = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if index < num_values:
            values_ptr[index] += 1

    return NumbaKernel(add_one, ("*int32", "int32"), threads_per_block=32)


def test_a_kernel_compiles_to_ptx_of_the_architecture_asked_for():
    ptx = add_one_kernel().compile_ptx((9, 0))
    assert ".target sm_90" in ptx
    assert ptx.count(".entry") == 1


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="expected tensors on one CUDA device, got cpu; use the reference"):
        add_one_kernel().launch(1, torch.zeros(4, dtype=torch.int32), 4)


@pytest.mark.parametrize("devices", [(-1, 0), (0, -1), (0, 1), (0, 0, 1)])
def test_tensors_on_several_devices_are_refused(monkeypatch, devices):
    values = [torch.zeros(4, dtype=torch.int32) for _ in devices]
    index_of = {id(tensor): index for tensor, index in zip(values, devices)}
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: index_of[id(tensor)])
    with pytest.raises(ValueError, match="expected tensors on one CUDA device"):
        add_one_kernel().launch(1, *values, None, 4)


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch, current):
    entered, launched = [], []

    class OnDevice:
        def __init__(self, index: int) -> None:
            entered.append(index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    monkeypatch.setattr(numba_launch, "_give_thread_a_context", lambda index: None)
    monkeypatch.setattr(numba_launch, "_stream", lambda index, handle: handle)
    monkeypatch.setattr(numba_launch, "_launch", lambda: lambda *arguments: launched.append(arguments))
    kernel = add_one_kernel()
    kernel._loaded_of_device[1] = "loaded"
    values = torch.zeros(4, dtype=torch.int32)
    kernel.launch(2, values, 4)
    ((stream, config, loaded, pointer, number),) = launched
    assert (stream, config.grid, loaded, pointer, number) == (1001, (2, 1, 1), "loaded", values.data_ptr(), 4)
    assert entered == ([] if current == 1 else [1])


@pytest.mark.parametrize(("context", "entered"), [(0, [1]), (77, [])], ids=["none", "of_the_caller"])
def test_a_thread_without_a_context_gets_one_and_others_keep_theirs(monkeypatch, context, entered):
    from cuda import core
    from cuda.bindings import driver

    made = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def set_current(self) -> None:
            made.append(self.index)

    monkeypatch.setattr(core, "Device", Device)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (0, context))
    monkeypatch.setattr(numba_launch, "_this_thread", threading.local())
    numba_launch._give_thread_a_context(1)
    assert made == entered
    assert numba_launch._this_thread.has_context


def test_each_thread_asks_for_its_context_once(monkeypatch):
    asked = []
    this_thread = threading.local()

    def give(index: int) -> None:
        asked.append(threading.current_thread().name)
        this_thread.has_context = True

    monkeypatch.setattr(numba_launch, "_this_thread", this_thread)
    monkeypatch.setattr(numba_launch, "_give_thread_a_context", give)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(numba_launch, "_stream", lambda index, handle: handle)
    monkeypatch.setattr(numba_launch, "_launch", lambda: lambda *arguments: None)
    kernel = add_one_kernel()
    kernel._loaded_of_device[0] = "loaded"

    def launch_twice() -> None:
        for _ in range(2):
            kernel._launch_on(0, 1, [], False)

    for name in ("first", "second"):
        thread = threading.Thread(target=launch_twice, name=name)
        thread.start()
        thread.join()
    assert asked == ["first", "second"]


def test_a_missing_compiler_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r'pip install "numba-cuda\[cu13\]"'):
        NumbaKernel(print, (), threads_per_block=32).compile_ptx((9, 0))


def test_a_missing_compiler_library_names_the_cure(monkeypatch):
    from cuda.pathfinder import DynamicLibNotFoundError
    from numba import cuda

    def compile_without_libraries(*args: object, **kwargs: object) -> None:
        raise DynamicLibNotFoundError("libnvvm.so.4")

    kernel = add_one_kernel()
    monkeypatch.setattr(cuda, "compile", compile_without_libraries)
    with pytest.raises(ImportError, match=r'libNVVM or NVRTC.*pip install "numba-cuda\[cu13\]"'):
        kernel.compile_ptx((9, 0))


def test_ptx_that_the_driver_refuses_names_its_version_and_the_cure(monkeypatch):
    from cuda import core

    class Refusing:
        @staticmethod
        def from_ptx(ptx: bytes) -> None:
            raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(core, "ObjectCode", Refusing)
    with pytest.raises(RuntimeError, match=r"PTX version 9\.5: CUDA_ERROR_UNSUPPORTED_PTX_VERSION.*pip install"):
        numba_launch._loaded(".version 9.5\n.visible .entry add_one(\n)")


def test_importing_the_launcher_loads_no_compiler():
    code = (
        "import sys, moe.runtime.numba_launch; print([name for name in ('numba', 'cuda.core') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_threads_that_launch_at_once_compile_once(monkeypatch):
    compiled, launched = [], []
    kernel = add_one_kernel()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(numba_launch, "_loaded", lambda ptx: compiled.append(ptx) or "loaded")
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait()
        launched.append(kernel._load(0))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launched == ["loaded"] * 4
    assert len(compiled) == 1


def test_a_launch_runs_on_the_gpu(cuda):
    values = torch.arange(70, dtype=torch.int32, device=cuda)
    kernel = add_one_kernel()
    kernel.launch(3, values, 65)
    kernel.launch(3, values, 65)
    expected = torch.arange(70, dtype=torch.int32)
    expected[:65] += 2
    assert torch.equal(values.cpu(), expected)


def test_a_launch_into_a_capture_is_replayed(cuda):
    values = torch.zeros(32, dtype=torch.int32, device=cuda)
    kernel = add_one_kernel()
    kernel.launch(1, values, 32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(1, values, 32)
    for _ in range(3):
        graph.replay()
    assert (values == 4).all()


def test_a_thread_that_never_used_the_gpu_launches(cuda):
    values = torch.zeros(32, dtype=torch.int32, device=cuda)
    kernel = add_one_kernel()
    kernel.launch(1, values, 32)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: kernel.launch(1, values, 32))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert (values == 2).all()
