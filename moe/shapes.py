"""Shapes of real layers, and the operations and bytes they cost at the least."""

from __future__ import annotations

from dataclasses import dataclass

from moe.gemm.config import ActivationType


@dataclass(frozen=True)
class MoEShape:
    """Dimensions of one MoE layer on one GPU, and its routing rule (a RoutingMethod's name)."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    method: str
    num_local_experts: int
    n_group: int = 0
    topk_group: int = 0
    routed_scaling_factor: float = 1.0
    activation: str = "Swiglu"  # an ActivationType's name

    @property
    def is_gated(self) -> bool:
        return ActivationType[self.activation].is_gated

    @property
    def expert_weights(self) -> int:
        """Elements of W1 and W2 of one expert."""
        return (3 if self.is_gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def weight_bytes(self) -> int:
        """Of all experts that lie here, bf16."""
        return 2 * self.num_local_experts * self.expert_weights

    def flops(self, num_rows: int) -> int:
        """Operations of both GEMMs over `num_rows` (token, expert) pairs, 2 a multiply-add."""
        return 2 * num_rows * self.expert_weights

    def bytes_moved(self, num_tokens: int, num_active_experts: int) -> int:
        """Fewest bytes: active experts' weights and the hidden states read once, the output written once, bf16."""
        return 2 * (num_active_experts * self.expert_weights + 2 * num_tokens * self.hidden_size)


def _shape(
    name: str, hidden: int, intermediate: int, experts: int, top_k: int, method: str, **more: object
) -> MoEShape:
    fields: dict = {"num_local_experts": experts} | more
    return MoEShape(name, hidden, intermediate, experts, top_k, method, **fields)


# Routing rules as transformers' modeling files have them. The two of Llama 4 weigh an expert's input in the model (`weight_on`), and here
# its output, as flashinfer's number for it does: the same sizes and products.
NAMED_SHAPES = {
    shape.name: shape
    for shape in (
        _shape("qwen3-30b-a3b", 2048, 768, 128, 8, "Renormalize"),
        _shape("qwen3-235b-a22b", 4096, 1536, 128, 8, "Renormalize"),
        _shape("qwen3-next-80b-a3b", 2048, 512, 512, 10, "Renormalize"),
        _shape("mixtral-8x7b", 4096, 14336, 8, 2, "Renormalize"),
        _shape("olmoe-1b-7b", 2048, 1024, 64, 8, "Default"),
        _shape(
            "deepseek-v3", 7168, 2048, 256, 8, "DeepSeekV3",
            n_group=8, topk_group=4, routed_scaling_factor=2.5,
        ),
        _shape(
            "deepseek-v3-ep8", 7168, 2048, 256, 8, "DeepSeekV3",
            num_local_experts=32, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        ),
        _shape("kimi-k2", 7168, 2048, 384, 8, "DeepSeekV3", n_group=1, topk_group=1, routed_scaling_factor=2.827),
        _shape("minimax-m2", 3072, 1536, 256, 8, "MiniMax2"),
        _shape(
            "nemotron-3-nano-30b-a3b", 2688, 1856, 128, 6, "DeepSeekV3",
            n_group=1, topk_group=1, routed_scaling_factor=2.5, activation="Relu2",
        ),
        _shape("sonic-7b", 1536, 256, 128, 8, "Renormalize"),
        _shape("llama4-scout", 5120, 8192, 16, 1, "Llama4"),
        _shape("llama4-maverick", 5120, 8192, 128, 1, "Llama4"),
    )
}  # fmt: skip
