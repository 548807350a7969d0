"""The few-token kernels in CUDA graphs: replays read new inputs, and dependent launches race with nothing."""

from __future__ import annotations

import pytest
import torch
from fused.few_tokens.cases import DEFAULT_TILES, LARGE, make_case
from torch import Tensor

from moe.flow import TopK
from moe.fused.few_tokens.config import FewTokenConfig
from moe.fused.few_tokens.experts import few_token_experts


def test_a_replayed_graph_reads_new_inputs(cuda):
    old, new = (make_case(**LARGE, **DEFAULT_TILES, uses_pdl=True, seed=seed, device=cuda) for seed in (1, 2))
    expected = new.run()
    old.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = old.run()
    for before, now in zip(
        (old.topk.expert_ids, old.topk.weights, old.hidden_states, old.w1, old.w2),
        (new.topk.expert_ids, new.topk.weights, new.hidden_states, new.w1, new.w2),
    ):
        before.copy_(now)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("local", [32, 8], ids=["all-local", "a-slice"])
def test_dependent_launches_race_with_nothing(cuda, local):
    """A captured chain of dependent layers, replayed over random inputs beside a noisy stream, has the plain chain's bits.

    Layers write into one another's inputs and share the activation's memory, so a kernel that reads or writes too early
    meets what another one is still using.
    """
    num_replays, num_inputs, num_layers = 10_000, 64, 4
    sizes = LARGE | {"hidden_size": 1024, "intermediate_size": 256}
    dependent = make_case(**sizes, **DEFAULT_TILES, num_local_experts=local, uses_pdl=True, device=cuda)
    plain = make_case(**sizes, **DEFAULT_TILES, num_local_experts=local, device=cuda)
    w1, w2 = plain.w1, plain.w2 * 16  # so that activations do not vanish over the layers
    num_tokens, top_k = plain.topk.expert_ids.shape
    generator = torch.Generator(device=cuda).manual_seed(0)
    scores = torch.rand(num_inputs, num_layers, num_tokens, 32, generator=generator, device=cuda)
    ids = scores.argsort(3)[..., :top_k].int().contiguous()
    hidden = torch.randn(num_inputs, num_tokens, 1024, generator=generator, device=cuda).bfloat16()

    def run(config: FewTokenConfig, ids: Tensor, buffers: list[Tensor]) -> None:
        for layer in range(num_layers):
            topk = TopK(ids[layer], plain.topk.weights)
            few_token_experts(topk, buffers[layer % 2], w1, w2, config=config, output=buffers[(layer + 1) % 2])

    buffers = [torch.empty_like(hidden[0]) for _ in range(2)]
    expected = []
    for of_input, hidden_states in zip(ids, hidden):
        buffers[0].copy_(hidden_states)
        run(plain.config, of_input, buffers)
        expected.append(buffers[num_layers % 2].clone())
    assert all(torch.isfinite(value).all() for value in expected)
    # A token of a slice that meets no local expert is zero from there on, so not every value is not.
    assert sum(bool(value.any()) for value in expected) > num_inputs // 2

    static_ids = ids[0].clone()
    run(dependent.config, static_ids, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(dependent.config, static_ids, buffers)
    noise = torch.cuda.Stream()
    busy = [torch.randn(size, size, device=cuda) for size in (64, 512, 1024)]
    num_wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    order = torch.randint(num_inputs, (num_replays,), generator=torch.Generator().manual_seed(1)).tolist()
    for replay, index in enumerate(order):
        if replay % 8 == 0:
            with torch.cuda.stream(noise):
                torch.mm(busy[index % 3], busy[index % 3])
        static_ids.copy_(ids[index])
        buffers[1].fill_(float("nan"))
        buffers[0].copy_(hidden[index])
        graph.replay()
        num_wrong += (buffers[num_layers % 2] != expected[index]).any()
    assert num_wrong.item() == 0
