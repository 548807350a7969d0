"""What is timed when a layer is tuned: random weights and inputs, and what the layer must make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.compose import reference_pipeline
from moe.config import MoEConfig
from moe.flow import TopK

MAX_CHECKED_TOKENS = 64
ROTATED_BYTES = 600e6  # of weights from one call to the next on the same inputs: ten times the L2 cache of an H200
ERROR_LIMIT = 1e-2  # relative Frobenius against the reference; both round three times to bf16, which gives up to 6e-3


@dataclass(frozen=True)
class InputSet:
    """Chosen experts and hidden states of one call."""

    topk: TopK
    hidden_states: Tensor  # [T, H] bfloat16


@dataclass(frozen=True)
class Problem:
    """Input sets that take turns, and the reference's result for some tokens of the first one."""

    sets: list[InputSet]
    checked_tokens: Tensor  # [C] int64
    expected: Tensor  # [C, H] float32

    def relative_error(self, output: Tensor) -> float:
        """Relative Frobenius error of the first set's [T, H] output over the checked tokens; NaN where it has one."""
        error = torch.linalg.vector_norm(output[self.checked_tokens].float() - self.expected).item()
        norm = torch.linalg.vector_norm(self.expected).item()
        return error / norm if norm else error


def sets_for(num_tokens: int, device: torch.device) -> int:
    """Input sets that take turns while timing, so that no call finds its weights in the L2 cache.

    Few tokens touch few experts, so many sets; above, one call's weights are larger than any cache. A CPU's caches
    hold no layer either way.
    """
    if device.type != "cuda":
        return 1
    return 16 if num_tokens <= 32 else 4 if num_tokens <= 512 else 2


def num_sets_of(config: MoEConfig, num_tokens: int, device: torch.device) -> int:
    """As `sets_for`, but no more than it takes to read ROTATED_BYTES: large layers do so in a call, and each call counts.

    Two up to 512 tokens all the same, where the number of active experts differs from draw to draw.
    """
    most = sets_for(num_tokens, device)
    bytes_of_expert = sum(2 * gemm.weight_rows * gemm.in_features for gemm in (config.gemm1, config.gemm2))
    num_active = config.permute.num_local_experts * (1 - (1 - config.top_k / config.num_experts) ** num_tokens)
    needed = math.ceil(ROTATED_BYTES / (num_active * bytes_of_expert))
    return min(most, max(needed, 1 if most <= 2 else 2))


def make_weights(config: MoEConfig, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W1 and W2 in the layer's format: normal over sqrt(fan-in), bf16."""
    generator = torch.Generator(device=device).manual_seed(seed)
    w1, w2 = (
        torch.empty(gemm.weight_shape, dtype=torch.bfloat16, device=device) for gemm in (config.gemm1, config.gemm2)
    )
    for weights, gemm in ((w1, config.gemm1), (w2, config.gemm2)):
        for expert in range(gemm.num_experts):  # one at a time: kernels that fill a tensor past 2^31 elements split it
            weights[expert].normal_(0.0, gemm.in_features**-0.5, generator=generator)
    return w1, w2


def make_problem(config: MoEConfig, num_tokens: int, w1: Tensor, w2: Tensor, *, seed: int = 0) -> Problem:
    """Uniform routing over all experts, and normal hidden states; the weights are only read."""
    device = w1.device
    generator = torch.Generator(device=device).manual_seed(seed)
    sets = _make_sets(config, num_tokens, num_sets_of(config, num_tokens, device), generator)
    num_checked = min(num_tokens, MAX_CHECKED_TOKENS)
    tokens = torch.arange(num_checked, device=device) * num_tokens // num_checked
    first = sets[0]
    sample = TopK(first.topk.expert_ids[tokens], first.topk.weights[tokens])
    expected = reference_pipeline(config).run_experts(sample, first.hidden_states[tokens], w1, w2)
    return Problem(sets, tokens, expected.float())


def _make_sets(config: MoEConfig, num_tokens: int, num_sets: int, generator: torch.Generator) -> list[InputSet]:
    """With few tokens, a set avoids the experts that those before it chose: they would lie in the cache."""
    device, num_experts, top_k = generator.device, config.num_experts, config.top_k
    leaves_most_idle = 4 * num_tokens * top_k <= num_experts
    is_used = torch.zeros(num_experts, dtype=torch.bool, device=device)
    sets = []
    for _ in range(num_sets):
        scores = torch.rand(num_tokens, num_experts, dtype=torch.float32, generator=generator, device=device)
        if 2 * int(is_used.sum()) > num_experts:
            is_used.zero_()
        if leaves_most_idle:
            scores[:, is_used] -= 1.0
        best = scores.topk(top_k, dim=1)
        is_used[best.indices] = True
        weights = torch.rand(num_tokens, top_k, dtype=torch.float32, generator=generator, device=device) + 0.1
        weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
        hidden_states = torch.empty(num_tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
        sets.append(InputSet(TopK(best.indices.int(), weights), hidden_states.normal_(generator=generator)))
    return sets
