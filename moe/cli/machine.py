"""What this machine is: device, versions, and which stages run kernels here."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from moe.cli.engines import Engine, describe_engines, engines_text
from moe.cli.text import wrap
from moe.cli.together import what_does_not_go_together
from moe.compose import build_pipeline
from moe.config import MoEConfig
from moe.pipeline import MoEPipeline
from moe.runtime.device import why_no_kernels
from moe.stages import CheckedStage

PACKAGES = ("moe-stages", "torch", "triton", "numba", "numba-cuda", "cuda-core", "pydantic", "numpy")
MORE_PACKAGES = (
    "cuda-toolkit",
    "nvidia-nvvm",
    "transformers",
    "flashinfer-python",
    "vllm",
    "sglang",
)  # listed where installed
CPUINFO = Path("/proc/cpuinfo")
NOT_INSTALLED = "not installed"
STAGES = ("route", "permute", "gemm1", "gemm2", "finalize")


class UnfitMachine(ValueError):
    """This machine cannot do what was asked."""


@dataclass(frozen=True)
class Machine:
    device: str  # as torch names it
    name: str
    details: str
    versions: dict[str, str]
    stages: dict[str, str]  # stage -> the function that runs it; empty where none can be imported
    conflicts: list[str]  # a sentence for each thing that does not go together
    engines: list[Engine]  # serving engines, and what their plug-ins of this package do


def pick_device(wanted: str) -> torch.device:
    """auto: the current CUDA device where there is one that kernels run on, else the CPU.

    Raises:
        UnfitMachine: "cuda" where torch sees no GPU, or one that no kernel runs on.
    """
    reason = why_no_kernels(torch.device("cuda")) if torch.cuda.is_available() else None
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() and reason is None else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnfitMachine("--device cuda: expected a GPU that torch can use, got none; see `python -m moe info`")
    if wanted == "cuda" and reason is not None:
        raise UnfitMachine(f"--device cuda: expected a GPU that the kernels run on, got {reason}; pass --device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def describe_machine(device: torch.device) -> Machine:
    """Names and versions; builds a small pipeline to see which functions stand in it."""
    config = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        details = (
            f"compute capability {properties.major}.{properties.minor}, {properties.multi_processor_count} "
            f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 1e6:.0f} MB"
        )
    else:
        name = _cpu_name()
        details = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
        if torch.cuda.is_available() and (reason := why_no_kernels(torch.device("cuda"))):
            details += f"; no kernel runs on {reason}"
    versions = {"python": platform.python_version()} | {package: installed_version(package) for package in PACKAGES}
    versions["cuda of torch"] = torch.version.cuda or "none"
    more = {package: installed_version(package) for package in MORE_PACKAGES}
    versions |= {package: version for package, version in more.items() if version != NOT_INSTALLED}
    conflicts = what_does_not_go_together(
        versions,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        driver_cuda=_cuda_of_driver() if device.type == "cuda" else None,
    )
    try:
        pipeline = build_pipeline(config, device)
    except Exception as error:  # a package that does not fit may raise anything when it is imported
        what = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        conflicts.append(f"kernels: expected to be importable, got {what}; none runs here")
        stages = {}
    else:
        stages = {stage: function_of_stage(pipeline, stage) for stage in STAGES}
    return Machine(str(device), name, details, versions, stages, conflicts, describe_engines())


def _cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows: it says 13020 for 13.2. None where cuda-core, which asks it, is missing."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    _, number = driver.cuDriverGetVersion()
    return number // 1000, number % 1000 // 10


def function_of_stage(pipeline: MoEPipeline, stage: str) -> str:
    """module.function of a stage, beneath what binds its config."""
    function = getattr(pipeline, stage)
    while isinstance(function, (functools.partial, CheckedStage)):
        function = function.func if isinstance(function, functools.partial) else function.run
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def is_kernel(function_name: str) -> bool:
    return not function_name.endswith("_reference")


def _cpu_name() -> str:
    names = (line.partition(":")[2].strip() for line in _lines(CPUINFO) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def info_text(machine: Machine) -> str:
    """The report of `python -m moe info`."""
    lines = [wrap(f"device    {machine.device}: {machine.name}, {machine.details}", indent=" " * 10), "", "versions"]
    lines += [f"  {name:<14} {version}" for name, version in machine.versions.items()]
    lines += ["", "stages on this device" if machine.stages else "stages on this device: none, see below"]
    for stage, function in machine.stages.items():
        lines.append(f"  {stage:<9} {'kernel   ' if is_kernel(function) else 'reference'} {function}")
    lines += ["", "engines", *(wrap(line, indent=" " * 11) for line in engines_text(machine.engines))]
    if machine.conflicts:
        lines += ["", "what does not go together"]
        lines += [wrap(f"  {sentence}", indent=" " * 4) for sentence in machine.conflicts]
    return "\n".join(lines)


def info_json(machine: Machine) -> dict[str, object]:
    return asdict(machine)
