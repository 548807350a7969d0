"""Whole layers cut over ranks: what each rank passes, and what all of them together must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import moe
from moe.flow import TopK
from moe.parallel import ParallelLayer, build_layer
from moe.parallel.transport import Transport
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, random_topk

HIDDEN, INNER, EXPERTS, TOP_K = 32, 24, 8, 3
CONFIG = moe.MoEConfig.create(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS, top_k=TOP_K)
EXACT_CONFIG = moe.MoEConfig.create(
    hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS, top_k=TOP_K, activation="Relu2"
)


@dataclass(frozen=True)
class Whole:
    """A layer with all tokens, in rank order, and all experts."""

    config: moe.MoEConfig
    topk: TopK
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    tokens_of_rank: tuple[int, ...]

    def tokens_at(self, rank: int) -> tuple[TopK, Tensor]:
        first = sum(self.tokens_of_rank[:rank])
        part = slice(first, first + self.tokens_of_rank[rank])
        ids, weights = self.topk.expert_ids[part].clone(), self.topk.weights[part].clone()
        return TopK(ids, weights), self.hidden_states[part].clone()

    def weights_of(self, layer: ParallelLayer) -> tuple[Tensor, Tensor]:
        experts = list(layer.local_experts)
        return self.w1[experts].contiguous(), self.w2[experts].contiguous()

    def reference(self) -> Tensor:
        return moe.reference_pipeline(self.config).run_experts(self.topk, self.hidden_states, self.w1, self.w2)

    def expect(self, output: Tensor) -> None:
        """Raise unless `output`, of all ranks, is the layer's."""
        activation = self.config.gemm1.activation
        exact = experts_in_float64(self.topk, self.hidden_states, self.w1, self.w2, activation=activation)
        assert_close_to_exact(output, self.reference(), exact)


def make_whole(tokens_of_rank: Sequence[int], *, seed: int = 0) -> Whole:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    num_tokens = sum(tokens_of_rank)
    return Whole(
        CONFIG,
        random_topk(num_tokens, EXPERTS, TOP_K, seed=seed),
        normal(num_tokens, HIDDEN),
        normal(EXPERTS, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, HIDDEN, INNER, scale=INNER**-0.5),
        tuple(tokens_of_rank),
    )


def make_exact_whole(tokens_of_rank: Sequence[int], *, seed: int = 0) -> Whole:
    """Whole numbers whose products float32 sums exactly in any order; only the sum over experts depends on its order."""
    generator = torch.Generator().manual_seed(seed)

    def whole_numbers(largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).bfloat16()

    num_tokens = sum(tokens_of_rank)
    topk = random_topk(num_tokens, EXPERTS, TOP_K, seed=seed)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    return Whole(
        EXACT_CONFIG,
        TopK(topk.expert_ids, weights),
        whole_numbers(3, num_tokens, HIDDEN),
        whole_numbers(1, EXPERTS, INNER, HIDDEN),
        whole_numbers(1, EXPERTS, HIDDEN, INNER),
        tuple(tokens_of_rank),
    )


def moved_to(whole: Whole, device: torch.device) -> Whole:
    topk = TopK(whole.topk.expert_ids.to(device), whole.topk.weights.to(device))
    x, w1, w2 = (tensor.to(device) for tensor in (whole.hidden_states, whole.w1, whole.w2))
    return replace(whole, topk=topk, hidden_states=x, w1=w1, w2=w2)


def run_rank(whole: Whole, layer: ParallelLayer) -> Tensor:
    """What one rank gets for its own tokens."""
    topk, hidden_states = whole.tokens_at(layer.transport.rank)
    return layer.run_experts(topk, hidden_states, *whole.weights_of(layer))


def run_rank_with_all_tokens(whole: Whole, layer: ParallelLayer) -> Tensor:
    """What one rank gets where every rank passes all tokens."""
    return layer.run_experts(whole.topk, whole.hidden_states, *whole.weights_of(layer))


def layer_over(transport: Transport, whole: Whole, **options: object) -> ParallelLayer:
    return build_layer(whole.config, transport, whole.hidden_states.device, **options)  # type: ignore[arg-type]
