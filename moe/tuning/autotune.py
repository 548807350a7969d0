"""`with autotune():` layers that are called within are tuned first, where no table has them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.tuning.buckets import buckets_up_to
from moe.tuning.candidates import left_to_the_model
from moe.tuning.choice import names_the_chain
from moe.tuning.lookup import is_tuned
from moe.tuning.search import tune

_IS_ON: ContextVar[bool] = ContextVar("is_on", default=False)
_LOCK = threading.RLock()  # a second thread waits for the search of the first, and finds what it found
_DONE: set[tuple[MoEConfig, torch.device, int]] = set()  # layer, where, bucket: nothing is left to tune
_LOGGER = logging.getLogger("moe.tuning")


@contextmanager
def autotune(tune_mode: bool = True) -> Iterator[None]:
    """Within, a call of a tuned pipeline (the flat calls and `tuned_pipeline`) first tunes its layer, once.

    That takes about a minute a layer, and is kept in the user's table. It holds for this thread, or asyncio task, alone.
    Nothing is ever timed outside, on a CPU, or while a CUDA graph is captured.

    Args:
        tune_mode: False turns an enclosing `autotune()` off.

    Example:
        >>> with moe.tuning.autotune():
        ...     pipeline(logits, hidden_states, w1, w2)
    """
    token = _IS_ON.set(tune_mode)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def active() -> bool:
    """Whether the caller is within `autotune()`."""
    return _IS_ON.get()


def tune_missing(
    config: MoEConfig,
    num_tokens: int,
    w1: Tensor,
    w2: Tensor,
    *,
    max_num_tokens: int = 8192,
    device: torch.device | None = None,
) -> None:
    """Tune the buckets up to `max_num_tokens` that no table holds. The weights are only read.

    A layer whose config names its kernels, as a batch-invariant one, is left as it is. What goes wrong is a
    warning: the call that it happens in can do without.

    Args:
        device: where the layer runs; None: where `w1` lies.
    """
    device = device or w1.device
    if not active() or device.type != "cuda" or num_tokens < 1 or names_the_chain(config):
        return
    layer = left_to_the_model(config)
    buckets = buckets_up_to(max_num_tokens)
    if not _missing(layer, device, buckets):
        return
    if torch.cuda.is_current_stream_capturing():
        warnings.warn(
            "moe.tuning.autotune: nothing is tuned while a CUDA graph is captured; call the layer once before",
            stacklevel=3,
        )
        return
    with _LOCK:
        if missing := _missing(layer, device, buckets):
            _LOGGER.warning(
                "tuning a layer of %d experts of %d x %d for %d counts of tokens on %s: about a minute, once",
                *(layer.permute.num_local_experts, layer.hidden_size, layer.intermediate_size, len(missing), device),
            )
            try:
                with autotune(False):
                    tune(layer, (w1, w2), missing, device=device, report=_LOGGER.info)
            except Exception as error:  # out of memory, a full disk: the layer runs untuned
                line = " ".join(str(error).split()) or "no message"
                warnings.warn(f"moe.tuning.autotune: stopped by {type(error).__name__}: {line}", stacklevel=3)
            finally:
                # What could not be tuned is not tried again in this process.
                _DONE.update((layer, device, bucket) for bucket in missing)


def _missing(layer: MoEConfig, device: torch.device, buckets: tuple[int, ...]) -> list[int]:
    return [b for b in buckets if (layer, device, b) not in _DONE and not is_tuned(layer, b, device)]
