"""A pipeline with a stage of one's own: what a token's experts are is read off beside the router. python examples/own_pipeline.py"""

import dataclasses

import torch

import moe

device = "cuda" if torch.cuda.is_available() else "cpu"
config = moe.MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
pipeline = moe.build_pipeline(config, device)
counts = torch.zeros(8, dtype=torch.int64, device=device)


def counting_router(logits, bias=None, *, replay_out=None):
    """The pipeline's own router, and a count of the tokens of each expert."""
    topk = pipeline.route(logits, bias, replay_out=replay_out)
    ids = topk.expert_ids.flatten().long()
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    return topk


mine = dataclasses.replace(pipeline, route=counting_router)
torch.manual_seed(0)
logits, tokens = torch.randn(37, 8, device=device), torch.randn(37, 256, device=device).bfloat16()
w1 = (torch.randn(8, 256, 256, device=device) / 16).bfloat16()
w2 = (torch.randn(8, 256, 128, device=device) / 12).bfloat16()
with torch.inference_mode():
    assert torch.equal(mine(logits, tokens, w1, w2), pipeline(logits, tokens, w1, w2))
print("tokens of each expert:", counts.tolist())
assert counts.sum() == 37 * 2
