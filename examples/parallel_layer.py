"""One MoE layer over all ranks: torchrun --nproc-per-node=2 examples/parallel_layer.py. GPUs (NCCL) where there are any, else CPUs (gloo)."""

import os

import torch
import torch.distributed as dist

import moe
from moe.parallel import build_layer

has_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)

config = moe.MoEConfig.create(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
layer = build_layer(config, None, device, exchange="gather")


def normal(*shape: int, seed: int) -> torch.Tensor:
    """The same on every rank, so that one rank can check what all did."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


w1 = (normal(8, 256, 256, seed=0) / 16).bfloat16()  # of all experts; a rank of a model would load its own only
w2 = (normal(8, 256, 128, seed=1) / 12).bfloat16()
mine = list(layer.local_experts)
num_tokens = 5 + layer.transport.rank  # ranks may have different numbers
tokens = normal(num_tokens, 256, seed=2 + layer.transport.rank).bfloat16()
logits = normal(num_tokens, 8, seed=100 + layer.transport.rank)

with torch.inference_mode():
    output = layer(logits, tokens, w1[mine], w2[mine])
    alone = moe.build_pipeline(config, device)(logits, tokens, w1, w2)
error = ((output - alone).float().norm() / alone.float().norm()).item()
print(
    f"rank {layer.transport.rank} of {layer.transport.num_ranks}: experts {mine}, {num_tokens} tokens, error {error:.1e}"
)
assert error < 1e-2
dist.destroy_process_group()
