"""For what timings hold: the GPU model, and the versions of what makes the kernels."""

from __future__ import annotations

import functools
import re
from importlib import metadata

import torch
from pydantic import Field

from moe.base_config import FrozenConfig

# Raised whenever a change of the kernels, or of the model's own choices, makes timings of before say nothing any more.
KERNELS_VERSION = 2
MAX_SLUG = 100


class GpuModel(FrozenConfig):
    """A GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]  # compute capability, (9, 0) for Hopper
    num_sms: int = Field(ge=0)
    l2_bytes: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, device: torch.device | str) -> GpuModel:
        """The model of a CUDA device, without an index the current one. All other devices are one model named by their type.

        Raises:
            RuntimeError: torch's own, where there is no such CUDA device.
        """
        device = torch.device(device)
        if device.type != "cuda":
            return cls(name=device.type, capability=(0, 0), num_sms=0, l2_bytes=0, memory_bytes=0)
        return _model_of_index(torch.cuda.current_device() if device.index is None else device.index)

    def slug(self) -> str:
        """Its name as a file's: nvidia_h200."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")[:MAX_SLUG] or "gpu"

    def shares_timings_with(self, other: GpuModel) -> bool:
        """Whether both are one product: the memory that a driver reports differs by what it keeps for itself."""
        ours, theirs = ((gpu.name, gpu.capability, gpu.num_sms, gpu.l2_bytes) for gpu in (self, other))
        return ours == theirs


@functools.cache
def _model_of_index(index: int) -> GpuModel:
    properties = torch.cuda.get_device_properties(index)
    return GpuModel(
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
    )


def torch_version() -> str:
    """As "2.13.0"."""
    return str(torch.__version__).partition("+")[0]


@functools.cache
def triton_version() -> str:
    """As "3.6.0", without importing it; "none" where it is not installed."""
    for package in ("triton", "pytorch-triton"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def has_same_minor(version: str, other: str) -> bool:
    """Whether two versions agree up to their second number."""
    return version.split(".")[:2] == other.split(".")[:2]
