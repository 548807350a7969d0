"""Work beside the exchange changes no result."""

from __future__ import annotations

import pytest
import torch
from parallel.layers import CONFIG, EXPERTS, layer_over, make_whole
from torch import Tensor

from moe.parallel import InHalves, WithSharedExpert
from moe.parallel.simulated import simulate
from moe.parallel.transport import Transport

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
