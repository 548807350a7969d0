"""Work beside the exchange changes no result."""

from __future__ import annotations

import pytest
import torch
from parallel.layers import CONFIG, EXPERTS, layer_over, make_whole
from torch import Tensor

from moe import Added
from moe.parallel import InHalves, WithSharedExpert
from moe.parallel.simulated import simulate
from moe.parallel.transport import Transport
from moe.testing.closeness import relative_error

TOKENS = (7, 0, 1)


def logits_of(rank: int) -> Tensor:
    return torch.randn(TOKENS[rank], EXPERTS, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("exchange", ["gather", "move"])
def test_two_halves_give_what_two_calls_give(exchange):
    whole = make_whole(TOKENS)

    def one_rank(transport: Transport) -> None:
        first, second, plain = (
            layer_over(transport, whole, exchange=exchange, max_tokens=7, counts_load=True) for _ in range(3)
        )
        logits, (_, x) = logits_of(transport.rank), whole.tokens_at(transport.rank)
        w1, w2 = whole.weights_of(first)
        cut = -(-len(x) // 2)
        wanted = torch.cat([plain(logits[part], x[part], w1, w2) for part in (slice(0, cut), slice(cut, len(x)))])
        given = torch.full_like(x, float("nan"))
        assert InHalves(first, second)(logits, x, w1, w2, output=given) is given
        assert torch.equal(given, wanted)
        assert torch.equal(first.load + second.load, plain.load)

    simulate(3, one_rank)


@pytest.mark.parametrize("exchange", ["gather", "move"])
def test_halves_and_a_shared_expert_take_what_the_layer_takes(exchange):
    whole = make_whole(TOKENS)

    def one_rank(transport: Transport) -> None:
        first, second, plain = (layer_over(transport, whole, exchange=exchange, max_tokens=7) for _ in range(3))
        logits, (_, x) = logits_of(transport.rank), whole.tokens_at(transport.rank)
        w1, w2 = whole.weights_of(first)
        generator = torch.Generator().manual_seed(5)
        w1_bias, w2_bias = (torch.randn(len(w1), rows, generator=generator) for rows in (w1.shape[1], w2.shape[1]))
        values, gate = torch.randn(x.shape, generator=generator), torch.rand(len(x), generator=generator)
        more = {"added": Added(values, gate), "w1_bias": w1_bias, "w2_bias": w2_bias}
        chosen, wanted_chosen, again = (torch.full((9, CONFIG.top_k), -7, dtype=torch.int16) for _ in range(3))
        wanted = plain(logits, x, w1, w2, routing_replay_out=wanted_chosen, **more)
        in_halves = InHalves(first, second)(logits, x, w1, w2, routing_replay_out=chosen, **more)
        assert relative_error(in_halves, wanted) <= 5e-3
        with_shared = WithSharedExpert(first, torch.zeros_like)
        assert torch.equal(with_shared(logits, x, w1, w2, routing_replay_out=again, **more), wanted)
        assert torch.equal(chosen, wanted_chosen)
        assert torch.equal(again, wanted_chosen)
        with pytest.raises(TypeError, match="output: expected a Tensor, got str; pass what a call returned"):
            plain.wait("output")

    simulate(3, one_rank)


def test_a_shared_expert_is_added():
    whole = make_whole(TOKENS)
    hidden = CONFIG.hidden_size
    weights = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(9)).bfloat16()

    def shared(x: Tensor) -> Tensor:
        return x @ weights

    def one_rank(transport: Transport) -> None:
        layer = layer_over(transport, whole)
        logits, (_, x) = logits_of(transport.rank), whole.tokens_at(transport.rank)
        w1, w2 = whole.weights_of(layer)
        wanted = layer(logits, x, w1, w2) + shared(x)
        assert torch.equal(WithSharedExpert(layer, shared)(logits, x, w1, w2), wanted)

    simulate(3, one_rank)
