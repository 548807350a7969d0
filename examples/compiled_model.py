"""A Hugging Face model, compiled without a graph break, its experts on moe: python examples/compiled_model.py (a GPU, or slowly a CPU)."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.integrations.huggingface import use_moe

sizes = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
experts = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = AutoConfig.for_model("qwen3_moe", **sizes, **experts)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
use_moe(model)

backend = "inductor" if device == "cuda" else "aot_eager"  # inductor needs a C++ compiler on a CPU
compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
with torch.no_grad():
    for num_tokens in (3, 17, 40):  # one graph for all
        tokens = torch.randint(0, 96, (1, num_tokens), device=device)
        logits, eager = compiled(tokens).logits, model(tokens).logits
        error = ((logits - eager).float().norm() / eager.float().norm()).item()
        print(f"{num_tokens} tokens: {error:.1e} from eager")
        assert error < 1e-2
