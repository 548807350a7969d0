"""vLLM runs its unquantised MoE layers on this package. Importable without vLLM, which would only log that it is not."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

KNOWN = ("0.32", "0.33")
_VARIABLE = "MOE_VLLM"
_MEANINGS = "1 (layers that moe does not compute stay with vLLM, and are named), only (they are refused) or 0"


def register() -> None:
    """Have vLLM make our method where it makes that of an unquantised MoE layer, if MOE_VLLM says so. A second call does nothing.

    Raises:
        ValueError: MOE_VLLM is none of 0, 1 and only.
        RuntimeError: no vLLM, or one that this package was not tried with.
    """
    if not is_asked_for():
        return
    expect_known(_installed())
    from moe.integrations.vllm_method import register_method

    register_method()


def is_asked_for() -> bool:
    """Whether MOE_VLLM is 1 or only."""
    asked = os.environ.get(_VARIABLE, "").strip()
    if asked not in ("", "0", "1", "only"):
        raise ValueError(f"{_VARIABLE}: expected {_MEANINGS}, got {asked!r}; set it to one of them")
    return asked in ("1", "only")


def refuses_others() -> bool:
    """Whether a layer that this package does not compute is refused rather than left to vLLM."""
    return os.environ.get(_VARIABLE, "").strip() == "only"


def expect_known(release: str) -> None:
    """Raise RuntimeError for a release of vLLM that this package was not tried with."""
    if ".".join(release.split(".")[:2]) not in KNOWN:
        raise RuntimeError(
            f"moe_stages: expected vllm {' or '.join(KNOWN)}, got {release}; install one of them, or unset {_VARIABLE}"
        )


def _installed() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError as error:
        raise RuntimeError(f"moe_stages: expected vllm {' or '.join(KNOWN)}, found none; install it") from error
