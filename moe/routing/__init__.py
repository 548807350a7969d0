"""Stage 1: from logits to each token's K experts and their weights. `topk.select_experts`, `reference.select_experts_reference`."""
