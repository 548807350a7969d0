"""GPUs and systems that no kernel runs on: one sentence, before anything is compiled."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import moe
from moe.cli.machine import UnfitMachine, describe_machine, pick_device
from moe.integrations.hf_experts import expect_weights
from moe.runtime import device as device_module
from moe.tuning import tune, tuned_pipeline

CONFIG = moe.MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)
CUDA = torch.device("cuda", 0)


def old_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    return "Tesla T4 of compute capability 7.5"


def rocm(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")

    def never(device: object = None) -> None:
        raise AssertionError("a ROCm device was asked for its capability")

    monkeypatch.setattr(torch.cuda, "get_device_capability", never)
    monkeypatch.setattr(torch.cuda, "get_device_properties", never)
    return r"a ROCm build of torch \("


def no_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(
        device_module, "find_spec", lambda name: None if name == "triton" else importlib.util.find_spec(name)
    )
    return "a system without triton"


@pytest.mark.parametrize("machine", [old_gpu, rocm, no_triton], ids=lambda machine: machine.__name__)
@pytest.mark.parametrize(
    "entry",
    [
        lambda: moe.build_pipeline(CONFIG, CUDA),
        lambda: tuned_pipeline(CONFIG, CUDA),
        lambda: tuned_pipeline(CONFIG, "cuda"),
    ],
    ids=["build_pipeline", "tuned_pipeline", "without_an_index"],
)
def test_a_machine_without_kernels_is_told_so(
    machine: Callable[[pytest.MonkeyPatch], str], entry: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = machine(monkeypatch)
    with pytest.raises(
        ValueError, match=rf"device: expected CUDA .* 8\.0 or newer, got {words}.*; the references run there"
    ):
        entry()
    moe.reference_pipeline(CONFIG)
    moe.build_pipeline(CONFIG, "cpu")


def test_nothing_is_searched_for_on_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    words = old_gpu(monkeypatch)
    with pytest.raises(ValueError, match=words):
        tune(CONFIG)


def test_a_hugging_face_model_is_refused_before_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True
        device = CUDA

    words = old_gpu(monkeypatch)
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    experts.down_proj = torch.zeros(2, 8, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    with pytest.raises(ValueError, match=words):
        expect_weights(experts, "experts")


def test_commands_run_on_the_cpu_there_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    words = old_gpu(monkeypatch)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UnfitMachine, match=f"--device cuda: .* got {words}; pass --device cpu"):
        pick_device("cuda")
    assert describe_machine(torch.device("cpu")).details.endswith(f"no kernel runs on {words}")


def test_the_refusal_compiles_and_imports_no_kernel() -> None:
    code = (
        "import sys, torch, moe\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda device=None: (7, 5)\n"
        "torch.cuda.get_device_name = lambda device=None: 'Tesla T4'\n"
        "config = moe.MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)\n"
        "try:\n    moe.build_pipeline(config, 'cuda')\n"
        "except ValueError as error:\n    print([name for name in ('triton', 'numba') if name in sys.modules], 'T4' in str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"
