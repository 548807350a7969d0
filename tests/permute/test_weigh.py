"""Each slot's token times its weight: as a GPU runs it, and by the reference."""

from __future__ import annotations

import pytest
import torch
from permute.stage import Stage

from moe.flow import TopK
from moe.permute.config import PermuteConfig
from moe.permute.reference import weigh_tokens_reference
from moe.permute.weigh import weigh_tokens
from moe.runtime.scratch import scratch_from


@pytest.fixture(params=["reference", "torch"])
def weigh(request: pytest.FixtureRequest, device: torch.device) -> Stage:
    return Stage(weigh_tokens_reference if request.param == "reference" else weigh_tokens, device)


def slice_of(top_k: int) -> PermuteConfig:
    return PermuteConfig(num_experts=8, num_local_experts=4, local_expert_offset=2, top_k=top_k)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "fp32_weights"])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden_size"), [(1, 1, 8), (7, 3, 13), (5, 2, 1032), (3, 4, 2056), (0, 2, 64)], ids=str
)
def test_each_slot_is_the_product_rounded_once(num_tokens, top_k, hidden_size, weights, weigh, poisoned_memory) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    x = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16().to(weigh.device)
    ids = torch.randint(-1, 9, (num_tokens, top_k), generator=generator, dtype=torch.int32).to(weigh.device)
    numbers = torch.randn(num_tokens, top_k, generator=generator).to(weigh.device, weights)
    weighed = weigh.run(x, TopK(ids, numbers), config=slice_of(top_k))
    assert weighed.topk.expert_ids is ids
    assert weighed.topk.weights.dtype == weights
    assert torch.equal(weighed.topk.weights, torch.ones_like(numbers))
    assert weighed.hidden_states.shape == (num_tokens * top_k, hidden_size)
    is_local = ((ids >= 2) & (ids < 6)).flatten()
    exact = (x[:, None].float() * numbers[..., None].float()).bfloat16().flatten(0, 1)
    assert torch.equal(weighed.hidden_states[is_local], exact[is_local])


def test_slots_without_a_local_expert_may_weigh_nan(weigh, poisoned_memory) -> None:
    x = torch.ones(2, 16, dtype=torch.bfloat16, device=weigh.device)
    ids = torch.tensor([[3, 7], [-1, 5]], dtype=torch.int32, device=weigh.device)
    numbers = torch.tensor([[2.0, float("nan")], [float("inf"), 0.5]], device=weigh.device)
    weighed = weigh.run(x, TopK(ids, numbers), config=slice_of(2))
    assert weighed.hidden_states[[0, 3], 0].tolist() == [2.0, 0.5]
    assert (weighed.topk.weights == 1).all()


def test_wrong_tensors_are_refused(weigh) -> None:
    x = torch.ones(2, 16, dtype=torch.bfloat16, device=weigh.device)
    ids = torch.zeros(2, 2, dtype=torch.int32, device=weigh.device)
    topk = TopK(ids, torch.ones(2, 2, device=weigh.device))
    for message, arguments in (
        ("hidden_states: expected bfloat16", (x.float(), topk)),
        (r"hidden_states: expected \[T=2, H\], got \[1, 16\]", (x[:1], topk)),
        ("expert_ids: expected int32", (x, TopK(ids.long(), topk.weights))),
        (r"expert_weights: expected \[T=2, K=2\]", (x, TopK(ids, topk.weights[:1]))),
    ):
        with pytest.raises(ValueError, match=message):
            weigh.run(*arguments, config=slice_of(2))


def test_a_workspace_of_inference_mode_is_written_outside_of_it(device: torch.device) -> None:
    with torch.inference_mode():
        workspace = torch.empty(2048, dtype=torch.uint8, device=device)
    x = torch.full((2, 16), 3.0, dtype=torch.bfloat16, device=device)
    topk = TopK(torch.full((2, 2), 3, dtype=torch.int32, device=device), torch.full((2, 2), 2.0, device=device))
    with scratch_from(workspace):
        weighed = weigh_tokens(x, topk, config=slice_of(2))
    assert weighed.hidden_states.data_ptr() == workspace.data_ptr()
    assert (weighed.hidden_states == 6).all()
    assert (weighed.topk.weights == 1).all()


def test_slots_past_two_billion_elements_are_found(cuda) -> None:
    x = torch.ones(300_000, 7168, dtype=torch.bfloat16, device=cuda)
    x[-1] = 3.0
    ids = torch.zeros(300_000, 1, dtype=torch.int32, device=cuda)
    config = PermuteConfig(num_experts=1, num_local_experts=1, top_k=1)
    weighed = weigh_tokens(x, TopK(ids, torch.full((300_000, 1), 2.0, device=cuda)), config=config)
    assert weighed.hidden_states[[0, -1]].amin(1).tolist() == weighed.hidden_states[[0, -1]].amax(1).tolist() == [2, 6]
