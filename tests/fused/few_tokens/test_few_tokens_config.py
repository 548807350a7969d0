"""Up to how many tokens the few-token kernels run, and which weights they take."""

from __future__ import annotations

import pytest
from fused.few_tokens.cases import few_token_config, make_case

from moe.config import MoEConfig
from moe.fused.few_tokens.config import MAX_REREAD_BYTES
from moe.gemm.config import WeightFormat


def test_weights_with_neighbours_along_rows_are_refused():
    with pytest.raises(ValueError, match="MajorK or BlockMajorK"):
        make_case(weight_format=WeightFormat(layout="MajorMn"))


@pytest.mark.parametrize(
    ("dims", "fastest_at", "slower_at"),
    [
        ((2048, 768, 128, 8), 8, 16),
        ((4096, 1536, 128, 8), 4, 16),
        ((2048, 1024, 64, 8), 4, 16),
        ((4096, 14336, 8, 2), 2, 4),
        ((5120, 8192, 16, 1), 4, 8),
        ((1536, 256, 128, 8), 12, 16),
        ((2688, 1856, 128, 6, "Relu2"), 8, 12),
    ],
    ids=["qwen3_30b", "qwen3_235b", "olmoe", "mixtral", "scout", "sonic_7b", "nemotron_3_nano"],
)
def test_few_tokens_end_where_an_h200_was_faster_by_grouping(dims, fastest_at, slower_at):
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k", "activation")
    layer = MoEConfig.create(**dict(zip(names, dims)))
    assert fastest_at <= few_token_config(layer).max_tokens < slower_at


@pytest.mark.parametrize("dim", [64, 200, 768, 1856])
def test_few_tokens_end_where_too_many_bytes_are_read_again(dim: int):
    layer = MoEConfig.create(hidden_size=4096, intermediate_size=dim, num_experts=128, top_k=8)
    config = few_token_config(layer)
    assert config._reread_bytes(config.max_tokens) <= MAX_REREAD_BYTES < config._reread_bytes(config.max_tokens + 1)


def test_a_slice_groups_its_tokens_earlier():
    layer = MoEConfig.create(hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8, num_local_experts=32)
    assert few_token_config(layer).max_tokens == 2


def test_a_token_alone_is_always_few():
    layer = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=64, top_k=64, num_local_experts=32)
    assert few_token_config(layer).max_tokens == 1
