"""Recording the experts of a Hugging Face model's tokens, and replaying them in another pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from moe.expert_ids import ID_DTYPES
from moe.integrations.hf_replay import record_routing, replay_routing
from moe.integrations.huggingface import use_moe
from moe.routing.config import RoutingConfig
from moe.testing.closeness import relative_error

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "moe_intermediate_size": 48, "num_experts_per_tok": 2,
}  # fmt: skip
PROMPTS = [[1, 2, 3], [7, 5, 9]]
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "norm_topk_prob": True, "scoring_func": "sigmoid",
    },
}  # fmt: skip


def build(model_type: str = "qwen3_moe") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return use_moe(model, "moe_invariant", is_batch_invariant=True)


def run(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def change_routers(model: nn.Module) -> None:
    """As training does, only more: other experts are chosen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gate.weight", ".router.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_full_pass_that_replays_a_cached_generation_scores_it_alike(model_type: str) -> None:
    model = build(model_type)
    with record_routing(model) as record:
        generated = model.generate(
            torch.tensor(PROMPTS), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    tokens = generated.sequences
    ids = record.ids(batch_size=2, length=tokens.shape[1])
    assert {tuple(values.shape) for values in ids.values()} == {(2, 9, 2)}
    assert all((values[:, -1] == -1).all() and (values[:, :-1] >= 0).all() for values in ids.values())
    with replay_routing(model, ids), record_routing(model) as again:
        scored = run(model, tokens)
    for path, values in again.ids(batch_size=2).items():
        assert torch.equal(values[:, :-1], ids[path][:, :-1])
    assert relative_error(scored[:, 2:-1], torch.stack(generated.logits, dim=1).double()) <= 2e-2


def products_depend_on_the_number_of_rows() -> bool:
    """Whether this CPU sums in another order for one row than for many: then no two passes of other shapes have the same bits."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (48, 64, 96):
            rows, matrix = torch.randn(18, width).to(dtype), torch.randn(64, width).to(dtype)
            whole = rows @ matrix.T
            for count in (1, 2, 3, 6):
                parts = torch.cat([part @ matrix.T for part in rows.split(count)])
                if not torch.equal(parts, whole):
                    return True
    return False


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_generating_and_scoring_have_the_same_bits(model_type: str) -> None:
    """Batch invariance is what a GPU needs for that in the experts. On a CPU torch's products must round alike, and mostly do."""
    model = build(model_type)
    with record_routing(model) as record:
        generated = model.generate(
            torch.tensor(PROMPTS), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    with replay_routing(model, record.ids(batch_size=2, length=9)):
        scored = run(model, generated.sequences)
    is_equal = torch.equal(scored[:, 2:-1].float(), torch.stack(generated.logits, dim=1).float())
    if not is_equal and products_depend_on_the_number_of_rows():
        pytest.skip("this CPU sums one row in another order than many, and a sum was rounded otherwise")
    assert is_equal


@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_recorded_experts_and_weights_give_the_bits_of_then_whatever_the_router_says_now(dtype: torch.dtype) -> None:
    model, tokens = build(), torch.tensor(PROMPTS)
    with record_routing(model) as record:
        wanted = run(model, tokens)
    change_routers(model)
    assert not torch.equal(run(model, tokens), wanted)
    ids = {path: values.to(dtype) for path, values in record.ids(batch_size=2).items()}
    with replay_routing(model, ids, weights=record.weights(batch_size=2)):
        assert torch.equal(run(model, tokens), wanted)
    with replay_routing(model, list(ids.values()), weights=list(record.weights(batch_size=2).values())):
        assert torch.equal(run(model, tokens), wanted)


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_that_the_router_chooses_itself_keep_its_weights_to_the_bit(model_type: str) -> None:
    model, tokens = build(model_type), torch.tensor(PROMPTS)
    with record_routing(model) as record:
        wanted = run(model, tokens)
    with replay_routing(model, record.ids(batch_size=2)):
        assert torch.equal(run(model, tokens), wanted)


@pytest.mark.parametrize("model_type", MODELS)
def test_other_experts_are_weighed_by_the_logits_of_now(model_type: str) -> None:
    """As the router itself weighs: the choice of now in another order has its weights in that order."""
    model, tokens = build(model_type), torch.tensor(PROMPTS)
    with record_routing(model) as record:
        wanted = run(model, tokens)
    turned = {path: values.flip(2) for path, values in record.ids(batch_size=2).items()}
    with replay_routing(model, turned), record_routing(model) as again:
        output = run(model, tokens)
    first = next(iter(turned))
    assert torch.equal(again.ids(2)[first], turned[first])
    torch.testing.assert_close(
        again.weights(2)[first].float(), record.weights(2)[first].flip(2).float(), rtol=1e-2, atol=0
    )
    assert relative_error(output, wanted.double()) <= 2e-2


def test_tokens_that_were_not_recorded_go_where_the_router_says() -> None:
    model, tokens = build(), torch.tensor(PROMPTS)
    with record_routing(model) as record:
        wanted = run(model, tokens)
    nowhere = {path: torch.full_like(values, -1) for path, values in record.ids(2).items()}
    with replay_routing(model, nowhere):
        assert torch.equal(run(model, tokens), wanted)
    assert torch.equal(run(model, tokens), wanted)  # nothing stays on the model


def test_a_generation_replays_step_by_step() -> None:
    model = build()
    options: dict[str, Any] = {
        "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    with record_routing(model) as record:
        wanted = model.generate(torch.tensor(PROMPTS), **options)
    change_routers(model)
    with replay_routing(model, record.ids(2), weights=record.weights(2)):
        again = model.generate(torch.tensor(PROMPTS), **options)
    assert torch.equal(again.sequences, wanted.sequences)
    assert all(map(torch.equal, again.logits, wanted.logits))


def test_what_cannot_be_replayed_is_refused_by_name() -> None:
    model, tokens = build(), torch.tensor(PROMPTS)
    with record_routing(model) as record:
        run(model, tokens)
    ids = record.ids(2)
    path = next(iter(ids))
    with replay_routing(model, ids), pytest.raises(ValueError, match=r"experts: expected those of 5 tokens .* got 3"):
        run(model, torch.tensor([[1, 2, 3, 4, 5]] * 2))
    with replay_routing(model, ids), pytest.raises(ValueError, match="B that divides 3 tokens"):
        run(model, tokens[:1])
    for values, message in (
        ({path: ids[path]}, "ids: expected one of each layer"),
        ([ids[path]], "ids: expected those of 3 layers"),
        ({name: value.float() for name, value in ids.items()}, "of an integer dtype, got"),
    ):
        with pytest.raises(ValueError, match=message), replay_routing(model, values):
            pass
    with (
        pytest.raises(ValueError, match=r"weights of .*expected \[2, 3, 2\]"),
        replay_routing(model, ids, weights=record.weights(1)),
    ):
        pass
    with pytest.raises(ValueError, match="batch_size: expected a divisor of 6, the tokens of a call, got 4"):
        record.ids(4)
    with pytest.raises(ValueError, match="length: expected at least the 3 tokens"):
        record.ids(2, length=2)
    part = model.model.layers  # without a config
    with (
        pytest.raises(ValueError, match=r"routing: expected a rule .* pass routing="),
        replay_routing(part, [*ids.values()]),
    ):
        pass
    with replay_routing(part, [*ids.values()], routing=RoutingConfig(num_experts=8, top_k=2)):
        run(model, tokens)
