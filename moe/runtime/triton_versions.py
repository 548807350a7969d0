"""What the releases of Triton want of those who launch its kernels: told apart here and nowhere else.

Gluon's names, which changed too, have one file of their own beside the kernels that call them.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton

Release = tuple[int, int]

# Given to every kernel: from 3.10 on it is off unless asked for, and 3.9 says so.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class Launcher(NamedTuple):
    """How a release's generated launcher is called, and where what it makes tensor maps with is found."""

    leading: Callable[[Any, Any, Any], tuple[Any, ...]]  # what goes before the kernel's own arguments
    takes_tuple: bool  # whether these are one argument
    map_maker: Callable[[inspect.ClosureVars], Callable[[Any, Any], Sequence[Any]] | None]


_HOOKS = (None, None, None)  # no metadata for them, and none to call
_SCRATCH = (None, None)  # memory for the kernel and for a profiler


def _leading_3_6(run: Any, function: Any, packed_metadata: Any) -> tuple[Any, ...]:
    return (function, run.launch_cooperative_grid, run.launch_pdl, *_SCRATCH, packed_metadata, *_HOOKS)


def _leading_3_7(run: Any, function: Any, packed_metadata: Any) -> tuple[Any, ...]:
    first = (function, run.launch_cooperative_grid, run.launch_pdl, packed_metadata)
    return (*first, *_HOOKS, *_SCRATCH, run.arg_annotations, run.kernel_signature)


def _global_map_maker(outer: inspect.ClosureVars) -> Callable[[Any, Any], Sequence[Any]] | None:
    return outer.globals.get("make_tensordesc_arg")


def _passed_map_maker(outer: inspect.ClosureVars) -> Callable[[Any, Any], Sequence[Any]] | None:
    make = outer.nonlocals.get("make_tensordesc_arg")
    # The third argument is what else the launcher was given: nothing on NVIDIA's GPUs reads it.
    return None if make is None else lambda descriptor, metadata: make(descriptor, metadata, None)


_LAUNCHERS: dict[Release, Launcher] = {
    (3, 6): Launcher(_leading_3_6, False, _global_map_maker),
    (3, 7): Launcher(_leading_3_7, True, _global_map_maker),
    (3, 8): Launcher(_leading_3_7, True, _passed_map_maker),
    (3, 9): Launcher(_leading_3_7, True, _passed_map_maker),
}


def _release_of(version: str) -> Release:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


RELEASE = _release_of(triton.__version__)


def launcher() -> Launcher | None:
    """The installed release's, or None where it is not known: then kernels go through `kernel[grid](...)`."""
    found = _LAUNCHERS.get(RELEASE)
    if found is None:
        warn_that_hopper_steps_aside()
    return found


class StreamingRegisters(NamedTuple):
    """Registers a thread that ptxas may give the few-token kernels; None: nothing is said to it."""

    gemm1: int | None
    gemm2_finalize: int | None


# From what Triton 3.8 and later write, ptxas left to itself keeps 2 to 5 loads of gemm1 in flight where 3.6 had 4 to 20, for the
# sake of warps that streaming does not need. Where a limit is said, it orders loads by how long they take. The limits are the
# smallest that spill in no layer with a name, in either weight format.
_STREAMING_REGISTERS: dict[Release, StreamingRegisters] = {
    (3, 6): StreamingRegisters(None, None),
    (3, 7): StreamingRegisters(None, None),
    (3, 8): StreamingRegisters(128, 255),
    (3, 9): StreamingRegisters(255, 168),
}


def streaming_registers() -> StreamingRegisters:
    """The installed release's, or those of the newest that is known."""
    return _STREAMING_REGISTERS.get(RELEASE, _STREAMING_REGISTERS[max(_STREAMING_REGISTERS)])


def has_known_gluon() -> bool:
    """Whether this is a release that our Gluon kernels were compiled and run with."""
    return launcher() is not None


@functools.cache
def warn_that_hopper_steps_aside(missing: str = "") -> None:
    """Say once in a process what is slower, and why: the release, or what its Gluon lacks."""
    lacks = f" without what Hopper's kernels call ({missing})" if missing else ""
    launches = "" if missing else "kernels go through Triton's own launcher, and "
    warnings.warn(
        f"triton: expected {known_releases()}, got {triton.__version__}{lacks}; {launches}the portable GEMM kernels stand "
        "for Hopper's: right, and slower. Install one of the expected releases",
        RuntimeWarning,
        stacklevel=3,
    )


def known_releases() -> str:
    oldest, newest = (".".join(map(str, edge(_LAUNCHERS))) for edge in (min, max))
    return f"{oldest} to {newest}"
