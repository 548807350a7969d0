"""Work beside the exchange: a shared expert, and two half batches by turns. On a CPU one after another, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.call import LayerCall
from moe.flow import Added, SwigluParams
from moe.parallel.layer import ParallelLayer, count_load, with_added
from moe.permute.added import as_added


@dataclass(frozen=True)
class WithSharedExpert:
    """A layer, and an expert that every token goes to, which runs beside dispatch, experts and combine on a stream of its own.

    Called as the layer is; gives its result plus the shared expert's.
    """

    layer: ParallelLayer
    shared: Callable[[Tensor], Tensor]  # hidden_states [T, H] bfloat16 -> [T, H] bfloat16

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        side = _Side(hidden_states.device)
        with side.beside():
            always = self.shared(hidden_states)
        result = self.layer(
            logits,
            hidden_states,
            w1,
            w2,
            bias=bias,
            swiglu=swiglu,
            output=output,
            routing_replay_out=routing_replay_out,
            added=added,
            w1_bias=w1_bias,
            w2_bias=w2_bias,
        )
        side.join()
        return result.add_(always)


@dataclass(frozen=True)
class InHalves:
    """A layer whose batch goes in two halves: one's routing and experts run beside the other's exchange.

    It pays where an exchange takes about as long as the experts; where the experts only read weights, two halves read them twice.

    Two layers of the same arguments; over symmetric memory with another `memory` each, for both halves are under way at once.
    """

    first: ParallelLayer
    second: ParallelLayer

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
        added: Tensor | Added | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> Tensor:
        """As the layer is called. A rank with one token or none has none in the second half."""
        biases = {"w1_bias": w1_bias, "w2_bias": w2_bias}
        tensors = (logits, hidden_states, w1, w2, swiglu, bias, output, routing_replay_out)
        call = LayerCall(*tensors, added=as_added(added), w1_bias=w1_bias, w2_bias=w2_bias)
        self.first.check(call)
        num_tokens = logits.shape[0]
        output = torch.empty_like(hidden_states) if output is None else output
        cut = -(-num_tokens // 2)
        exchange = _Side(hidden_states.device)
        halves = []
        for layer, part in ((self.first, slice(0, cut)), (self.second, slice(cut, num_tokens))):
            chosen = None if routing_replay_out is None else routing_replay_out[part]
            topk = layer.pipeline.route(
                logits[part], bias, replay_out=chosen
            )  # the second half's beside the first one's dispatch
            if layer.load is not None:
                count_load(layer.load, topk)
            with exchange.beside():
                halves.append((layer, part, layer.dispatch(hidden_states[part], topk), exchange.mark()))
        rows = []
        for layer, part, dispatched, mark in halves:
            exchange.wait_for(mark)
            rows.append(layer.run_local(dispatched, w1, w2, swiglu=swiglu, **biases))
            with exchange.beside():  # the first half's beside the second one's experts
                layer.combine(rows[-1], dispatched, output=output[part])
        exchange.join()
        return with_added(output, call.added)


class _Side:
    """A second stream of a device. What is allocated on it is safe to use here until `join`, which every use ends with."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _side_stream(device) if device.type == "cuda" else None

    def beside(self) -> AbstractContextManager[object]:
        """Within, work is queued on the side, after all that is queued here so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event | None:
        """Where the side is now."""
        return None if self.stream is None else self.stream.record_event()

    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        """What is queued here from now on comes after the mark."""
        if self.stream is not None and mark is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(mark)

    def join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
