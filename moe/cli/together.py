"""Which installed releases go together: a sentence for each thing that does not, and what mends it."""

from __future__ import annotations

import re
from collections.abc import Mapping

Version = tuple[int, ...]
Versions = Mapping[str, str]  # package -> version, or "not installed"

TRITON_OF_TORCH: dict[Version, Version] = {
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}
KERNEL_PACKAGES = ("triton", "numba", "numba-cuda", "cuda-core")
NEWEST_NUMPY_OF_NUMBA_CUDA = (2, 4)
OLDEST_CAPABILITY = (8, 0)


def what_does_not_go_together(
    versions: Versions, *, capability: Version | None = None, driver_cuda: Version | None = None
) -> list[str]:
    """Sentences, none where all is well.

    Args:
        versions: of packages, as `python -m moe info` lists them.
        capability: compute capability of the GPU; None without one.
        driver_cuda: the newest CUDA that the driver knows; None without one.
    """
    found = [
        *_torch_and_triton(_read(versions, "torch"), _read(versions, "triton")),
        *_numpy(_read(versions, "numpy"), _read(versions, "numba-cuda")),
        *(_kernel_packages(versions) if capability else ()),
    ]
    if capability and capability < OLDEST_CAPABILITY:
        found.append(
            f"GPU: expected compute capability {_text(OLDEST_CAPABILITY)} or later, got {_text(capability)}; no kernel runs "
            "on it: use the references on a CPU"
        )
    nvvm = _read(versions, "nvidia-nvvm")
    if driver_cuda and nvvm and nvvm[:2] > driver_cuda[:2]:
        found.append(
            f"nvidia-nvvm {_text(nvvm[:2])}: expected at most the driver's CUDA {_text(driver_cuda[:2])}, which may not read "
            f"what it compiles; pip install 'cuda-toolkit[nvvm]=={_text(driver_cuda[:2])}.*', or a newer driver"
        )
    return found


def _torch_and_triton(torch: Version | None, triton: Version | None) -> list[str]:
    found = []
    known = sorted(TRITON_OF_TORCH)
    if torch and torch[:2] not in TRITON_OF_TORCH:
        found.append(f"torch {_text(torch)}: expected {_text(known[0])} to {_text(known[-1])}; others are not tested")
    if not triton:
        return found
    known = sorted(set(TRITON_OF_TORCH.values()))
    if triton[:2] not in known:
        found.append(
            f"triton {_text(triton)}: expected {_text(known[0])} to {_text(known[-1])}; with others the portable GEMM kernels "
            "stand for Hopper's, and launches are slower"
        )
    elif torch and TRITON_OF_TORCH.get(torch[:2], triton[:2]) != triton[:2]:
        found.append(
            f"triton {_text(triton)}: torch {_text(torch)} comes with {_text(TRITON_OF_TORCH[torch[:2]])}; our kernels run "
            "with either, torch.compile may not"
        )
    return found


def _numpy(numpy: Version | None, numba_cuda: Version | None) -> list[str]:
    if not numpy or not numba_cuda or numpy[:2] <= NEWEST_NUMPY_OF_NUMBA_CUDA:
        return []
    newest = _text(NEWEST_NUMPY_OF_NUMBA_CUDA)
    return [
        f"numpy {_text(numpy)}: expected at most {newest}, as numba-cuda {_text(numba_cuda)} fails to import with later ones; "
        "pip install 'numpy<2.5'"
    ]


def _kernel_packages(versions: Versions) -> list[str]:
    missing = [name for name in KERNEL_PACKAGES if not _read(versions, name)]
    if not missing:
        return []
    return [f"{', '.join(missing)}: expected for the kernels of this GPU, got none; pip install moe-stages on Linux"]


def _read(versions: Versions, package: str) -> Version | None:
    found = re.match(r"\d+(?:\.\d+)*", versions.get(package, ""))
    return tuple(int(part) for part in found[0].split(".")) if found else None


def _text(version: Version) -> str:
    return ".".join(map(str, version))
