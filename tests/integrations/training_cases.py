"""A model trained by two processes on half of the tokens each; every rank runs every case."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from integrations.test_huggingface import build_model, tokens_for
from parallel.processes import Case
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe.integrations.huggingface import use_moe
from moe.testing.closeness import relative_error

CPU = torch.device("cpu")


def small_model() -> nn.Module:
    return build_model("qwen3_moe").train()


def tokens_of(rank: int) -> Tensor:
    return tokens_for(CPU)[rank : rank + 1]


def wanted_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The mean over both ranks' tokens, by one process."""
    model = use_moe(copy.deepcopy(model))
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for rank in range(2):
        model.zero_grad()
        (model(tokens_of(rank), labels=tokens_of(rank)).loss / 2).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.float()
    return total


def check_gradients(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        full: Any = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        error = relative_error(full, wanted[name.removeprefix("module.")])
        assert error <= 5e-3, (name, error)  # the mean is rounded to bfloat16 once more


def with_gradients(case: Case) -> Case:
    """Cases are run in inference mode."""

    @functools.wraps(case)
    def run(group: Any) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            case(group)

    return run


@with_gradients
def ddp(group: Any) -> None:
    model = small_model()
    wanted = wanted_gradients(model)
    wrapped = DistributedDataParallel(use_moe(model))
    tokens = tokens_of(group.rank())
    wrapped(tokens, labels=tokens).loss.backward()
    check_gradients(wrapped, wanted)


@with_gradients
def ddp_accumulates(group: Any) -> None:
    """Two passes before gradients are exchanged."""
    model = small_model()
    wanted = {name: 2 * grad for name, grad in wanted_gradients(model).items()}
    wrapped = DistributedDataParallel(use_moe(model))
    tokens = tokens_of(group.rank())
    with wrapped.no_sync():
        wrapped(tokens, labels=tokens).loss.backward()
    wrapped(tokens, labels=tokens).loss.backward()
    check_gradients(wrapped, wanted)


def check_fully_shard(dtype: torch.dtype, group: Any) -> None:
    model = small_model()
    wanted = wanted_gradients(model)
    for parameter in model.parameters():  # and no buffer: frequencies in bfloat16 would be another model's
        parameter.data = parameter.data.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    use_moe(model)
    tokens = tokens_of(group.rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(tokens, labels=tokens).loss.backward()
    check_gradients(model, wanted)
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, p.to_local()) for old, p in zip(before, model.parameters()))
    optimizer.zero_grad()
    assert model(tokens, labels=tokens).loss.isfinite()


@with_gradients
def in_bfloat16(group: Any) -> None:
    check_fully_shard(torch.bfloat16, group)


@with_gradients
def in_float32(group: Any) -> None:
    check_fully_shard(torch.float32, group)


CASES = {
    "ddp": ddp,
    "ddp_accumulates": ddp_accumulates,
    "fully_shard": in_bfloat16,
    "fully_shard_in_float32": in_float32,
}
