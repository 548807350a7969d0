"""What `python -m moe info` says of releases that do not go together."""

from __future__ import annotations

import json

import pytest

from moe.__main__ import main
from moe.cli import machine
from moe.cli.together import TRITON_OF_TORCH, what_does_not_go_together

GOOD = {"torch": "2.14.1", "triton": "3.8.0", "numpy": "2.4.6", "numba": "0.65.1", "numba-cuda": "0.30.4"}
GOOD |= {"cuda-core": "1.2.2", "nvidia-nvvm": "13.0.88"}
GPU = {"capability": (9, 0), "driver_cuda": (13, 0)}


@pytest.mark.parametrize(("torch", "triton"), TRITON_OF_TORCH.items(), ids=str)
def test_nothing_is_said_of_what_goes_together(torch, triton):
    versions = GOOD | {"torch": f"{torch[0]}.{torch[1]}.0+cu130", "triton": f"{triton[0]}.{triton[1]}.1"}
    assert what_does_not_go_together(versions, **GPU) == []


@pytest.mark.parametrize(
    ("changes", "gpu", "says"),
    [
        ({"torch": "2.16.0"}, GPU, "torch 2.16.0: expected 2.11 to 2.15"),
        ({"triton": "3.10.2"}, GPU, "triton 3.10.2: expected 3.6 to 3.9; with others the portable GEMM kernels"),
        ({"triton": "3.9.0"}, GPU, "triton 3.9.0: torch 2.14.1 comes with 3.8"),
        ({"numpy": "2.5.2"}, GPU, "numpy 2.5.2: expected at most 2.4, as numba-cuda 0.30.4"),
        ({"cuda-core": "not installed"}, GPU, "cuda-core: expected for the kernels of this GPU"),
        ({"nvidia-nvvm": "13.5.37"}, GPU, "nvidia-nvvm 13.5: expected at most the driver's CUDA 13.0"),
        ({}, GPU | {"capability": (7, 5)}, "GPU: expected compute capability 8.0 or later, got 7.5"),
    ],
)
def test_each_thing_that_does_not_go_together_is_one_sentence(changes, gpu, says):
    (sentence,) = what_does_not_go_together(GOOD | changes, **gpu)
    assert sentence.startswith(says)


def test_a_machine_without_a_gpu_needs_no_kernels_packages():
    versions = {"torch": "2.13.0+cpu", "numpy": "2.5.2"} | dict.fromkeys(
        ("triton", "numba", "numba-cuda", "cuda-core"), "not installed"
    )
    assert what_does_not_go_together(versions) == []


def test_info_prints_the_sentences_and_gives_them_as_json(monkeypatch, capsys):
    real = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: "3.10.2" if name == "triton" else real(name))
    assert main(["info", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "what does not go together" in shown
    assert "triton 3.10.2: expected 3.6 to 3.9" in shown
    assert main(["info", "--device", "cpu", "--json"]) == 0
    sentences = json.loads(capsys.readouterr().out)["conflicts"]
    assert any(sentence.startswith("triton 3.10.2: expected 3.6 to 3.9") for sentence in sentences)


@pytest.mark.parametrize(
    "error", [ImportError("no module\nof this name"), AttributeError("gone"), RuntimeError()], ids=repr
)
def test_info_says_what_does_not_fit_where_that_keeps_the_kernels_from_being_imported(error, monkeypatch, capsys):
    def build(config, device):
        raise error

    monkeypatch.setattr(machine, "build_pipeline", build)
    monkeypatch.setattr(
        machine, "installed_version", lambda package: "2.5.2" if package == "numpy" else GOOD.get(package, "1")
    )
    assert main(["info", "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "stages on this device: none, see below" in text
    assert "numpy 2.5.2: expected at most 2.4" in text
    what = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    assert f"kernels: expected to be importable, got {what}; none runs here" in text
    assert main(["info", "--device", "cpu", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["stages"] == {}
    assert [sentence.split(":")[0] for sentence in described["conflicts"]] == ["numpy 2.5.2", "kernels"]
