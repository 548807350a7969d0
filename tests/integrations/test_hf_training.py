"""Hugging Face models trained with their experts on our pipeline, against their own experts and float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.7")
from integrations.test_huggingface import build_model, experts_in, routed_as, tokens_for

from moe.gemm.config import ActivationType, WeightLayout
from moe.integrations.hf_call import call_experts
from moe.integrations.hf_experts import Form
from moe.integrations.hf_replay import record_routing, replay_routing
from moe.integrations.huggingface import use_moe
from moe.testing.closeness import relative_error

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")


def trainable(model_type: str, device: torch.device, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A model with its own experts, and the same with ours."""
    model = build_model(model_type, device, **settings).train()
    return model, use_moe(copy.deepcopy(model))


def backward(model: nn.Module, tokens: Tensor, **more: Any) -> dict[str, Tensor]:
    """The gradients of the model's loss, by parameter; those that are there."""
    model.zero_grad()
    model(tokens, labels=tokens, **more).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expert_calls(model: nn.Module, tokens: Tensor) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    hooks = [
        experts.register_forward_hook(lambda module, args, output: calls.append((module, *args)))
        for experts in experts_in(model)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_gradients_are_as_close_to_float64_as_the_models_own(family, device):
    model, ours = trainable(family, device)
    for experts, (_, hidden_states, ids, weights) in zip(experts_in(ours), expert_calls(model, tokens_for(device))):
        exact_experts = copy.deepcopy(experts).double()
        exact_experts.config = copy.copy(exact_experts.config)
        exact_experts.config._experts_implementation = "eager"
        grad = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(2)).to(hidden_states)
        results = []
        for module, dtype in ((experts, torch.bfloat16), (exact_experts, torch.float64)):
            module.zero_grad()
            x, w = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden_states, weights))
            module(x, ids, w).backward(grad.to(dtype))
            results.append([x.grad, w.grad, *(p.grad for p in module.parameters())])
        for got, exact in zip(*results):
            assert relative_error(got, exact) <= 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_gets_gradients_near_those_of_its_own_experts(family, device):
    model, ours = trainable(family, device)
    tokens = tokens_for(device)
    exact = copy.deepcopy(model).double()
    results = []
    for each in (ours, model, exact):
        with routed_as(each, expert_calls_of_ids(each, tokens, routed_by=model)):
            results.append(backward(each, tokens))
    got, own, exact_grads = results
    assert got.keys() == own.keys()
    for name, grad in got.items():
        assert relative_error(grad, exact_grads[name]) <= 2 * relative_error(own[name], exact_grads[name]), name


def expert_calls_of_ids(model: nn.Module, tokens: Tensor, *, routed_by: nn.Module | None = None) -> list[Any]:
    """What `routed_as` takes: the choice of a model, by weights of this one's dtype."""
    dtype = next(model.parameters()).dtype
    calls = expert_calls(routed_by or model, tokens)
    return [(module, x, ids, weights.to(dtype), None) for module, x, ids, weights in calls]


def test_logits_have_the_bits_of_a_pass_without_gradients(device):
    _, ours = trainable("qwen3_moe", device)
    tokens = tokens_for(device)
    with torch.no_grad():
        generated = ours(tokens).logits
    trained = ours(tokens).logits
    assert trained.requires_grad
    assert torch.equal(trained, generated)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_recorded_routing_is_replayed_in_the_pass_that_is_trained_on(device, is_batch_invariant):
    model = build_model("qwen3_moe", device).train()
    use_moe(model, f"moe_{is_batch_invariant}", is_batch_invariant=is_batch_invariant)
    tokens = tokens_for(device)
    with torch.no_grad(), record_routing(model) as record:
        generated = model(tokens).logits
    with replay_routing(model, record.ids(batch_size=len(tokens))):
        logits = model(tokens).logits
        assert torch.equal(logits, generated)
        logits.float().square().mean().backward()
    for experts in experts_in(model):
        assert experts.gate_up_proj.grad.any()
        assert experts.down_proj.grad.any()
    assert model.model.layers[0].mlp.gate.weight.grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(device, use_reentrant):
    _, ours = trainable("qwen3_moe", device)
    tokens = tokens_for(device)
    wanted = backward(ours, tokens)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = backward(ours, tokens, use_cache=False)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(grad, wanted[name]) for name, grad in got.items())


@pytest.mark.parametrize("dynamic", [False, None])
def test_a_compiled_model_is_one_graph_and_changes_no_bit(device, dynamic):
    _, ours = trainable("qwen3_moe", device, num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (tokens_for(device), tokens_for(device)[:2]):
        wanted, got = backward(ours, tokens), {}
        ours.zero_grad()
        compiled(tokens, labels=tokens).loss.backward()
        got = {name: p.grad for name, p in ours.named_parameters()}
        assert all(torch.equal(grad, wanted[name]) for name, grad in got.items() if name in wanted)


def test_a_float32_model_trains_under_autocast(device):
    model, _ = trainable("qwen3_moe", device)
    model = model.float()
    ours = copy.deepcopy(model)
    tokens = tokens_for(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        use_moe(ours)
        got = backward(ours, tokens)
    wanted = backward(model, tokens)
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        if "mlp.experts" in name:
            assert relative_error(grad, wanted[name]) <= 0.15, name


def test_frozen_experts_get_no_gradient_and_pass_theirs_on(device):
    _, ours = trainable("qwen3_moe", device)
    tokens = tokens_for(device)
    wanted = backward(ours, tokens)
    for experts in experts_in(ours):
        experts.requires_grad_(False)
    got = backward(ours, tokens)
    assert got.keys() == {name for name in wanted if "mlp.experts" not in name}
    assert all(torch.equal(grad, wanted[name]) for name, grad in got.items())


def successors(num_sequences: int, generator: torch.Generator) -> Tensor:
    """Sequences in which each token follows from the one before."""
    tokens = [torch.randint(1, 96, (num_sequences,), generator=generator)]
    for _ in range(11):
        tokens.append((tokens[-1] * 5 + 3) % 95 + 1)
    return torch.stack(tokens, dim=1)


def loss_curve(model: nn.Module, num_steps: int) -> Tensor:
    """The losses of a loop as Trainer's."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator, losses = torch.Generator().manual_seed(7), []
    for _ in range(num_steps):
        tokens = successors(8, generator).to(device)
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def model_to_train(implementation: str, device: torch.device = torch.device("cpu")) -> nn.Module:
    model = build_model("qwen3_moe").train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    model = model.to(device)
    if implementation == "moe":
        return use_moe(model)
    model.set_experts_implementation(implementation)
    return model


def test_the_loss_falls_as_with_the_models_own_experts(device):
    steps = 200
    eager, other, ours = (loss_curve(model_to_train(name, device), steps) for name in ("eager", "grouped_mm", "moe"))
    spread = (other - eager).abs().mean()
    assert (ours - eager).abs().mean() <= 2 * spread
    assert eager[0] - eager[-1] > 1.0
    assert abs(ours[-5:].mean() - eager[-5:].mean()) <= 0.1


def test_lora_on_attention_trains_with_frozen_experts(device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(build_model("qwen3_moe", device).train(), config)
    ours = use_moe(copy.deepcopy(model))
    tokens = tokens_for(device)
    wanted, got = backward(model, tokens), backward(ours, tokens)
    assert got.keys() == wanted.keys()
    assert got.keys() == {name for name, _ in ours.named_parameters() if "lora_" in name}
    assert all(grad.isfinite().all() and grad.any() for grad in got.values())
    assert loss_curve(ours, 8)[-1].isfinite()


def test_lora_on_experts_trains_by_merged_weights(device):
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(build_model("qwen3_moe", device).train(), config)
    ours = use_moe(copy.deepcopy(model))
    tokens = tokens_for(device)
    with torch.no_grad():
        calls = expert_calls_of_ids(model, tokens)
    with routed_as(ours, calls), routed_as(model, calls):
        wanted, got = backward(model, tokens), backward(ours, tokens)
    assert got.keys() == wanted.keys()
    assert len(got) == 2 * 2 * 2
    for name, grad in got.items():
        assert relative_error(grad, wanted[name]) <= 0.15, name


@pytest.mark.parametrize("implementation", ["eager", "compiled"])
def test_gpt_oss_trains_with_its_biases(device, implementation):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16}
    model, ours = trainable("gpt_oss", device, **settings, num_hidden_layers=1)
    tokens = tokens_for(device)
    if implementation == "compiled":
        torch._dynamo.reset()
        wanted = backward(ours, tokens)
        got = backward(torch.compile(ours, fullgraph=True, backend="aot_eager"), tokens)
        assert all(torch.equal(grad, wanted[name.removeprefix("_orig_mod.")]) for name, grad in got.items())
        return
    calls = expert_calls_of_ids(model, tokens)
    with routed_as(ours, calls), routed_as(model, calls):
        got, wanted = backward(ours, tokens), backward(model, tokens)
    assert got.keys() == wanted.keys()
    assert {"gate_up_proj_bias", "down_proj_bias"} <= {name.rpartition(".")[2] for name in got}
    for name, grad in got.items():
        if "mlp.experts" in name:
            assert relative_error(grad, wanted[name]) <= 0.15, name


def test_experts_whose_activation_has_no_gradient_are_refused_where_their_own_code_cannot_run():
    form = Form(ActivationType.GegluTanh, WeightLayout.MajorK)
    w1, w2 = torch.zeros(2, 32, 24).bfloat16(), torch.zeros(2, 24, 16).bfloat16()
    inputs = (torch.zeros(3, 24).bfloat16().requires_grad_(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"own: forward only: .*hidden_states asks.*moe\.build_training_pipeline"):
        call_experts("own", form, (w1, w2), *inputs, is_batch_invariant=False)


def test_llama_4_whose_inputs_are_weighed_trains(device):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 48, "intermediate_size_mlp": 48}
    model = build_model("llama4_text", device, **settings, head_dim=16, attn_temperature_tuning=False).train()
    ours = use_moe(copy.deepcopy(model))
    tokens = tokens_for(device)
    got, own, exact = backward(ours, tokens), backward(model, tokens), backward(copy.deepcopy(model).double(), tokens)
    assert got.keys() == own.keys()
    for name, grad in got.items():
        assert relative_error(grad, exact[name]) <= 2 * relative_error(own[name], exact[name]) + 1e-2, name


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from integrations.training_cases import CASES
    from parallel.processes import run_cases

    preload = ("transformers.models.qwen3_moe.modeling_qwen3_moe",)
    return run_cases(2, CASES, tmp_path_factory.mktemp("ranks"), preload=preload)


@pytest.mark.parametrize("case", ["ddp", "ddp_accumulates", "fully_shard", "fully_shard_in_float32"])
def test_two_processes(case, reports):
    assert not reports[case], reports[case]
