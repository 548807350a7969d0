"""Recording which experts each token of a Hugging Face model went to, and sending tokens there again in another pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.expert_ids import ID_DTYPES, as_int32_ids
from moe.integrations.hf_models import experts_of, stood_for
from moe.routing.config import MAX_EXPERTS, RoutingConfig
from moe.routing.reference import weigh_experts

ByLayer = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
NOT_RECORDED = -1


@dataclass
class RoutingRecord:
    """What the experts of each layer were called with, call by call, by the path of the experts module."""

    ids_of_call: dict[str, list[Tensor]] = field(default_factory=dict)  # each [T, K] int32
    weights_of_call: dict[str, list[Tensor]] = field(default_factory=dict)  # each [T, K], as the router gave them

    def ids(self, batch_size: int = 1, *, length: int | None = None) -> dict[str, Tensor]:
        """By layer the chosen experts [batch_size, tokens of a sequence, K] int32, calls one after another.

        Args:
            batch_size: sequences of each call; with generate, those of its input, times what it returns for each.
            length: pad to so many tokens by rows of -1, which stand for tokens that were not recorded: generate never feeds
                the last one to the model.
        """
        return {path: _sequences(calls, batch_size, length, NOT_RECORDED) for path, calls in self.ids_of_call.items()}

    def weights(self, batch_size: int = 1, *, length: int | None = None) -> dict[str, Tensor]:
        """By layer the weights of those experts, of the same shape; padded by 0."""
        return {path: _sequences(calls, batch_size, length, 0) for path, calls in self.weights_of_call.items()}


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Keep which experts every token goes to, and with which weights, in all passes within.

    Not under torch.compile, and not while a CUDA graph is captured: what is kept grows with each call. Within `replay_routing` it
    keeps what was replayed.

    Raises:
        TypeError, ValueError: not a model with experts that are called with the choice.
    """
    record = RoutingRecord()

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            _, ids, weights = arguments
            record.ids_of_call[path].append(as_int32_ids(ids.detach(), MAX_EXPERTS).clone())
            record.weights_of_call[path].append(weights.detach().clone())

        return hook

    with ExitStack() as hooks:
        for path, experts in _called_with_choices(model):
            record.ids_of_call[path], record.weights_of_call[path] = [], []
            hooks.callback(experts.register_forward_pre_hook(keep(path)).remove)
        yield record


@contextmanager
def replay_routing(
    model: nn.Module, ids: ByLayer, *, weights: ByLayer | None = None, routing: RoutingConfig | None = None
) -> Iterator[None]:
    """Send the tokens of all passes within to given experts, in the order of the tokens: one pass, or generation step by step.

    Args:
        ids: by layer, as `RoutingRecord.ids` or in the order of layers: [B, L, K] of any integer dtype, or [T, K] of one sequence.
            A row that begins with -1 was not recorded: it goes where the router says now.
        weights: of the same form and shape, what each expert counts; None: by the router's logits of now. A token whose experts
            are those that the router chooses now then keeps the router's weights to the bit, and others have the rule's.
        routing: the rule by which logits of now weigh; None: that of the model's config. Has no part with `weights`.

    Raises:
        TypeError, ValueError: not a model with experts that are called with the choice; ids or weights that do not fit it or a
            pass, or a model whose rule is not known, with the cure.
    """
    layers = dict(_called_with_choices(model))
    ids_of, weights_of = _by_layer("ids", ids, layers), _by_layer("weights", weights, layers)
    if weights_of is None:
        routing = routing or _routing_of(model)
    with ExitStack() as hooks:
        for path, experts in layers.items():
            logits: list[Tensor] = []
            if weights_of is None:
                for router in _routers_beside(model, path):
                    hooks.callback(router.register_forward_hook(_keeps_logits(logits)).remove)
            assert ids_of is not None
            replay = _Replay(path, ids_of[path], None if weights_of is None else weights_of[path], routing, logits)
            hooks.callback(experts.register_forward_pre_hook(replay).remove)
        yield


class _Replay:
    """Takes the next rows of a layer at each call of its experts."""

    def __init__(
        self, path: str, ids: Tensor, weights: Tensor | None, routing: RoutingConfig | None, logits: list[Tensor]
    ) -> None:
        self.path, self.routing, self.logits = path, routing, logits
        self.ids = _expect_ids(path, ids)
        self.weights = None if weights is None else _expect_weights(path, weights, self.ids)
        self.next_token = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, ids_now, weights_now = arguments
        first, last = self.next_token, self._end_of_call(ids_now)
        self.next_token = last
        ids = self._rows(self.ids, first, last, ids_now.device)
        if self.weights is not None:
            weights = self._rows(self.weights, first, last, ids_now.device).to(weights_now.dtype)
        else:
            weights = self._weights_of_now(ids, ids_now, weights_now)
        is_recorded = ids[:, :1] >= 0
        return (
            hidden_states,
            torch.where(is_recorded, ids.to(ids_now.dtype), ids_now),
            torch.where(is_recorded, weights, weights_now),
        )

    def _end_of_call(self, ids_now: Tensor) -> int:
        num_sequences, length, top_k = self.ids.shape
        num_tokens = len(ids_now)
        if ids_now.shape[1] != top_k or num_tokens % num_sequences:
            raise ValueError(
                f"ids of {self.path}: expected [B, L, K={ids_now.shape[1]}] with B that divides {num_tokens} tokens, got "
                f"{list(self.ids.shape)}; record with the batch size of this pass"
            )
        last = self.next_token + num_tokens // num_sequences
        if last > length:
            raise ValueError(
                f"ids of {self.path}: expected those of {last} tokens of each sequence, got {length}; pass length={last} to "
                "RoutingRecord.ids, which fills up with -1, and use a new replay_routing for each pass over the same tokens"
            )
        return last

    def _rows(self, values: Tensor, first: int, last: int, device: torch.device) -> Tensor:
        return values[:, first:last].flatten(0, 1).to(device)

    def _weights_of_now(self, ids: Tensor, ids_now: Tensor, weights_now: Tensor) -> Tensor:
        assert self.routing is not None
        if not self.logits or self.logits[-1].shape != (len(ids), self.routing.num_experts):
            raise ValueError(
                f"{self.path}: expected a router beside it that returns its logits [T, E={self.routing.num_experts}] first, "
                "found none; replay with weights=record.weights(..)"
            )
        logits = self.logits.pop()
        logits = logits if logits.dtype in (torch.float32, torch.bfloat16) else logits.float()
        weighed = weigh_experts(logits.contiguous(), ids, config=self.routing).weights
        is_same = (ids == ids_now).all(dim=1, keepdim=True)
        return torch.where(is_same, weights_now, weighed.to(weights_now.dtype))


def _keeps_logits(kept: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, result: Any) -> None:
        logits = result[0] if isinstance(result, tuple) else result
        kept[:] = [logits.detach().flatten(0, -2)]

    return hook


def _called_with_choices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all experts, each of which is called with (tokens, ids, weights)."""
    for path, module in [*experts_of(model), *stood_for(model)]:
        if len(inspect.signature(type(module).forward).parameters) != 4:
            raise ValueError(
                f"{path}: expected experts that are called with ids and weights, got {type(module).__name__}, which routes by "
                "itself; its routing cannot be recorded or replayed"
            )
        yield path, module


def _routers_beside(model: nn.Module, path: str) -> list[nn.Module]:
    around = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
    return [
        child
        for name, child in around.named_children()
        if name in ("gate", "router") or type(child).__name__.endswith("Router")
    ]


def _routing_of(model: nn.Module) -> RoutingConfig:
    try:
        return MoEConfig.from_hf_config(getattr(model, "config", None)).routing
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"routing: expected a rule by which the model's logits weigh, got none from its config ({error}); pass routing=, or "
            "weights=record.weights(..)"
        ) from error


def _by_layer(name: str, values: ByLayer | None, layers: Mapping[str, nn.Module]) -> dict[str, Tensor] | None:
    if values is None:
        return None
    if isinstance(values, Mapping):
        if set(values) != set(layers):
            raise ValueError(
                f"{name}: expected one of each layer, {', '.join(layers)}, got {', '.join(values) or 'none'}"
            )
        return dict(values)
    if len(values) != len(layers):
        raise ValueError(f"{name}: expected those of {len(layers)} layers ({', '.join(layers)}), got {len(values)}")
    return dict(zip(layers, values))


def _expect_ids(path: str, ids: Tensor) -> Tensor:
    """[B, L, K] int32."""
    if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES or ids.dim() not in (2, 3):
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"ids of {path}: expected [B, L, K] or [T, K] of an integer dtype, got {got}; pass RoutingRecord.ids(..)"
        )
    return as_int32_ids(ids if ids.dim() == 3 else ids[None], MAX_EXPERTS)


def _expect_weights(path: str, weights: Tensor, ids: Tensor) -> Tensor:
    weights = weights if weights.dim() == 3 else weights[None]
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ValueError(
            f"weights of {path}: expected {list(ids.shape)} of a floating dtype, as its ids, got {list(weights.shape)} "
            f"{weights.dtype}; pass RoutingRecord.weights(..) of the same batch_size and length"
        )
    return weights


def _sequences(calls: Sequence[Tensor], batch_size: int, length: int | None, filler: int) -> Tensor:
    """[T, K] a call -> [batch_size, tokens, K]."""
    if not calls:
        raise ValueError("record: expected a pass of the model within record_routing, got none")
    for call in calls:
        if len(call) % batch_size:
            raise ValueError(f"batch_size: expected a divisor of {len(call)}, the tokens of a call, got {batch_size}")
    tokens = torch.cat([call.unflatten(0, (batch_size, -1)) for call in calls], dim=1)
    missing = 0 if length is None else length - tokens.shape[1]
    if missing < 0:
        raise ValueError(f"length: expected at least the {tokens.shape[1]} tokens that were recorded, got {length}")
    return nn.functional.pad(tokens, (0, 0, 0, missing), value=filler)
