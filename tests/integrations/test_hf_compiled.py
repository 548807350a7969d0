"""A two-layer Qwen3-MoE as a compiled, exported and served program: no graph break, the bits of the eager model, our experts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

import moe.integrations.hf_call  # noqa: E402
from moe.integrations.huggingface import check_model, register, use_moe  # noqa: E402

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on a CPU")
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [1]]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def build() -> Any:
    config = transformers.AutoConfig.for_model("qwen3_moe", head_dim=16, intermediate_size=64, **SIZES, **EXPERTS)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call of our experts."""
    counts: list[int] = []
    run = moe.integrations.hf_call._run_experts
    monkeypatch.setattr(
        moe.integrations.hf_call, "_run_experts", lambda *given: (counts.append(given[0].shape[0]), run(*given))[1]
    )
    return counts


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_compiled_model_is_one_graph_with_the_bits_of_the_eager_one(backend: str) -> None:
    model = use_moe(build())
    counter = CompileCounterWithBackend(backend)
    # Else inductor keeps numbers in float32 between operations that eager torch rounds to bfloat16 after each.
    with torch._inductor.config.patch(emulate_precision_casts=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        compiled(torch.randint(0, 96, (2, 5)))
        num_compiles = counter.frame_count  # dynamo looks twice where it finds a float
        for count in (3, 17, 40):
            tokens = torch.randint(0, 96, (2, count))
            assert torch.equal(compiled(tokens).logits, model(tokens).logits)
    assert counter.frame_count == num_compiles <= 2


def test_dynamo_finds_one_graph_and_no_break_with_an_operator_a_layer() -> None:
    explained = torch._dynamo.explain(use_moe(build()))(torch.randint(0, 96, (2, 5)))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    targets = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert sum("run_experts" in target for target in targets) == 2


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "not strict"])
def test_an_exported_model_gives_the_bits_of_the_eager_one(is_strict: bool) -> None:
    model = Logits(use_moe(build()))
    count = torch.export.Dim("count", min=2, max=64)
    tokens = torch.randint(0, 96, (2, 5))
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: count},), strict=is_strict)
    for number in (5, 3, 40):
        tokens = torch.randint(0, 96, (2, number))
        assert torch.equal(program.module()(tokens), model(tokens))


def test_continuous_batching_runs_our_experts_and_generates_what_single_prompts_do(
    saved: Path, calls: list[int]
) -> None:
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no ContinuousBatchingConfig")
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, experts_implementation="moe", attn_implementation="sdpa"
    ).eval()
    check_model(model)
    how = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=95, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, page_size=32)
    results = model.generate_batch(PROMPTS, generation_config=how, continuous_batching_config=sizes)
    batched, calls[:] = list(calls), []
    assert batched[:2] == [sum(map(len, PROMPTS))] * 2  # all prompts in one step, in each of two layers
    assert len(batched) == 12
    for prompt, result in zip(PROMPTS, results.values()):
        alone = model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt) :]
        assert result.generated_tokens == alone.tolist()


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_the_name_survives_loading(saved: Path, calls: list[int], device_map: str | None) -> None:
    if device_map is not None:
        pytest.importorskip("accelerate")
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, experts_implementation="moe", device_map=device_map
    )
    assert model.config._experts_implementation == "moe"
    check_model(model)
    model(torch.tensor([PROMPTS[0]], device=model.device))
    assert calls == [3, 3]
