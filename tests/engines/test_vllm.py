"""One real MoE layer of vLLM on a CPU, made by vLLM's own factory with the plug-in loaded as vLLM loads it."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ["MOE_VLLM"] = "1"
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
vllm = pytest.importorskip("vllm")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.model_executor.custom_op import op_registry_oot  # noqa: E402
from vllm.model_executor.layers.fused_moe import layer as factory  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402

from moe.testing.closeness import relative_error  # noqa: E402

E, K, H, I = 8, 2, 64, 48  # noqa: E741


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_general_plugins()


@pytest.fixture(scope="module")
def config() -> Iterator[Any]:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.compilation_config.static_forward_context = {}
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config


NUMBER = iter(range(1000))
SIZES = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I, "params_dtype": torch.bfloat16}


def build(config: Any, **more: Any) -> Any:
    """A layer with weights that were loaded: its runner, its experts and float64 copies of w1 and w2."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        runner = factory.FusedMoEFactory(**SIZES | more, prefix=f"model.layers.{next(NUMBER)}.mlp.experts")
    experts = runner.routed_experts
    with torch.no_grad():
        for name, scale in (("w13_weight", 8), ("w2_weight", 7)):
            weight = getattr(experts, name)
            weight.copy_(torch.randn(weight.shape) / scale)
        if more.get("has_bias"):
            for bias in (experts.w13_bias, experts.w2_bias):
                bias.copy_(torch.randn(bias.shape))
    experts.quant_method.process_weights_after_loading(experts)
    return runner, experts


def expected(experts: Any, x: Tensor, ids: Tensor, weights: Tensor, expert_map: Any = None, act: Any = None) -> Tensor:
    """In float64, expert by expert."""
    w1, w2 = experts.w13_weight.double(), experts.w2_weight.double()
    b1, b2 = (getattr(experts, name, torch.zeros(len(w1), 1)).double() for name in ("w13_bias", "w2_bias"))
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].double()):
            known = expert_map is None or 0 <= expert < len(expert_map)
            slot = expert if expert_map is None or not known else int(expert_map[expert])
            if known and 0 <= slot < len(w1):
                result[token] += weight * (w2[slot] @ (act or silu)(w1[slot] @ x[token].double() + b1[slot]) + b2[slot])
    return result


def silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2)
    return torch.nn.functional.silu(gate) * up


def clamped(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2)
    return torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)


def call(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return experts.quant_method.apply(experts, x.clone(), weights, ids, None, None)


def inputs(num_tokens: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, E).argsort(1)[:, :K].to(dtype)
    return torch.randn(num_tokens, H).bfloat16(), ids, torch.rand(num_tokens, K)


def is_ours(experts: Any) -> bool:
    kernel = experts.quant_method.moe_kernel
    return kernel is not None and type(kernel.fused_experts).__name__ == "MoeStagesExperts"


def test_the_plug_in_put_our_method_in_place_of_vllms(config: Any):
    assert op_registry_oot["UnquantizedFusedMoEMethod"].__name__ == "MoeStagesMethod"
    assert type(build(config)[1].quant_method).__name__ == "MoeStagesMethod"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [1, 7, 65])
def test_a_layer_is_right(config: Any, num_tokens: int, dtype: torch.dtype):
    _, experts = build(config)
    assert is_ours(experts)
    x, ids, weights = inputs(num_tokens, dtype)
    with set_forward_context(None, config):
        assert relative_error(call(experts, x, ids, weights), expected(experts, x, ids, weights)) < 1e-2


def test_a_whole_step_from_logits_is_right(config: Any):
    runner, experts = build(config, renormalize=True)
    x, _, _ = inputs(9)
    logits = torch.randn(9, E)
    weights, ids = torch.softmax(logits.double(), 1).topk(K)
    weights /= weights.sum(1, keepdim=True)
    try:
        with set_forward_context(None, config):
            output = runner(x.clone(), logits)
    except (AttributeError, RuntimeError) as error:
        if "_C" not in str(error) and "topk_softmax" not in str(error):
            raise
        pytest.skip(f"vLLM's own top-k needs its compiled library: {error}")
    assert relative_error(output, expected(experts, x, ids, weights)) < 1e-2


def test_padding_and_stale_ids_are_skipped(config: Any):
    _, experts = build(config)
    x, ids, weights = inputs(9)
    ids[4], ids[7, 0] = -1, 2071690107
    x[4] = float("nan")
    with set_forward_context(None, config):
        output = call(experts, x, ids, weights)
    assert not output[4].any()
    x[4] = 0
    assert relative_error(output, expected(experts, x, ids, weights)) < 1e-2


def test_no_tokens_give_no_rows(config: Any):
    _, experts = build(config)
    with set_forward_context(None, config):
        assert call(experts, *inputs(0)).shape == (0, H)


@pytest.mark.parametrize("kind", ["linear", "round robin", "any", "none here"])
def test_slices_of_experts_are_right(config: Any, kind: str):
    _, experts = build(config)
    slots = {
        "linear": [-1, -1, -1, -1, 0, 1, 2, 3],
        "round robin": [0, -1, 1, -1, 2, -1, 3, -1],
        "any": [3, -1, 0, 0, -1, 7, 3, 1],
        "none here": [-1] * 8,
    }
    experts.register_buffer("_expert_map", torch.tensor(slots[kind], dtype=torch.int32), persistent=False)
    x, ids, weights = inputs(20)
    ids[3] = 2071690107
    with set_forward_context(None, config):
        output = call(experts, x, ids, weights)
    exact = expected(experts, x, ids, weights, slots[kind])
    assert not output[3].any()
    if kind == "none here":
        assert not output.any()
    else:
        assert relative_error(output, exact) < 1e-2


def test_weights_rewritten_in_place_are_read(config: Any):
    _, experts = build(config)
    x, ids, weights = inputs(6)
    with set_forward_context(None, config), torch.no_grad():
        first = call(experts, x, ids, weights).clone()
        address = experts.w2_weight.data_ptr()
        experts.w2_weight.mul_(2)
        experts.quant_method.process_weights_after_loading(experts)
        assert experts.w2_weight.data_ptr() == address
        assert torch.equal(call(experts, x, ids, weights), first * 2)


def test_a_limit_of_swiglu_clamps(config: Any):
    _, experts = build(config, swiglu_limit=0.5)
    assert is_ours(experts)
    x, ids, weights = inputs(9)
    with set_forward_context(None, config):
        output = call(experts, x, ids, weights)
    assert relative_error(output, expected(experts, x, ids, weights, act=clamped)) < 1e-2


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM chooses a backend of its own first, and has none for these layers on a CPU."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    chosen = (method.UnquantizedMoeBackend.TRITON, object)
    monkeypatch.setattr(method, "select_unquantized_moe_backend", lambda *_, **__: chosen)


def gpt_oss(rows: Tensor) -> Tensor:
    gate, up = rows[::2].clamp(max=7), rows[1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def test_a_layer_of_gpt_oss_is_right_and_follows_its_biases(config: Any, as_on_a_gpu: None):
    _, experts = build(config, has_bias=True, activation="swigluoai")
    assert is_ours(experts)
    x, ids, weights = inputs(9)
    ids[3] = -1
    with set_forward_context(None, config), torch.no_grad():
        output = call(experts, x, ids, weights).clone()
        assert relative_error(output, expected(experts, x, ids, weights, act=gpt_oss)) < 1e-2
        assert not output[3].any()
        experts.w2_bias.mul_(3)
        changed = call(experts, x, ids, weights)
        assert relative_error(changed, expected(experts, x, ids, weights, act=gpt_oss)) < 1e-2
    assert relative_error(changed, output) > 0.1


def gelu(rows: Tensor, approximate: str = "none") -> Tensor:
    gate, up = rows.chunk(2)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def step(rows: Tensor) -> Tensor:
    gate, up = (10 * rows).chunk(2)
    return torch.nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)


GATES = {"gelu": gelu, "gelu_tanh": lambda rows: gelu(rows, "tanh"), "swiglustep": step}


@pytest.mark.parametrize("activation", GATES)
def test_other_gates_are_right(config: Any, activation: str, as_on_a_gpu: None):
    _, experts = build(config, activation=activation)
    assert is_ours(experts)
    x, ids, weights = inputs(9)
    with set_forward_context(None, config), torch.no_grad():
        exact = expected(experts, x, ids, weights, act=GATES[activation])
        if activation == "swiglustep":
            experts.w13_weight.mul_(10)  # so that the limit of 7 is reached
        assert relative_error(call(experts, x, ids, weights), exact) < 1e-2


def test_numbers_of_a_gate_are_read_by_vllms_names():
    from types import SimpleNamespace

    from moe.integrations.hf_experts import Gate
    from moe.integrations.vllm_method import gate_of

    numbers = SimpleNamespace(
        alpha=1.5, beta=0.5, clamp_limit=3.0, activation_situ_beta=4.0, activation_situ_linear_beta=25.0
    )
    assert gate_of(MoEActivation.SITU, numbers) == Gate(4.0, 25.0)
    assert gate_of(MoEActivation.SWIGLUOAI, numbers) == Gate(1.702, 1.0, 7.0)
    assert gate_of(MoEActivation.SWIGLUOAI_UNINTERLEAVE, numbers) == Gate(1.5, 0.5, 3.0)
    assert gate_of(MoEActivation.SILU, numbers) == Gate(clamp_limit=3.0)


def test_weights_on_the_input_are_applied_once(config: Any):
    _, experts = build(config, top_k=1, apply_router_weight_on_input=True)
    x, ids, weights = inputs(9)
    ids, weights = ids[:, :1].contiguous(), weights[:, :1].contiguous()
    with set_forward_context(None, config):
        output = call(experts, x, ids, weights)
    scaled = x * weights.bfloat16()
    assert relative_error(output, expected(experts, scaled, ids, torch.ones_like(weights))) < 1e-2


OTHERS = {
    "limit": ({"activation": "gelu", "swiglu_limit": 0.5}, r"swiglu_limit: expected None with gelu, got 0\.5"),
    "limit of 0": ({"swiglu_limit": 0.0}, r"limit of the gate: expected a positive number, got 0\.0"),
    "alpha": ({"swiglu_alpha": 1.702}, r"swiglu_alpha: expected None with silu, got 1\.702"),
    "sizes": ({"intermediate_size": 44}, "intermediate_size: .*44"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_is_not_ours_is_refused_in_words_where_no_other_may_run(
    config: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    more, words = OTHERS[name]
    monkeypatch.setenv("MOE_VLLM", "only")
    with pytest.raises(NotImplementedError, match=rf"model\.layers\.\d+\.mlp\.experts: {words}"):
        build(config, **more)


@pytest.mark.parametrize("name", ["limit", "sizes"])
def test_a_layer_that_is_not_ours_stays_with_vllm_and_is_named_once(
    config: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    from moe.integrations import vllm_method

    said: list[str] = []
    monkeypatch.setattr(vllm_method, "_SAID", set())
    monkeypatch.setattr(vllm_method.logger, "warning", lambda words, *values: said.append(words % values))
    more, _ = OTHERS[name]
    field = {"limit": "swiglu_limit", "sizes": "intermediate_size"}[name]
    with torch.device("meta"):
        for _ in range(2):
            prefix = f"model.layers.{next(NUMBER)}.mlp.experts"
            runner = factory.FusedMoEFactory(**SIZES | more, prefix=prefix)
            assert runner.routed_experts.quant_method.experts_cls.__name__ != "MoeStagesExperts"
    assert len(said) == 1
    assert field in said[0]
    assert "model.layers." in said[0]


def test_weights_of_another_type_than_tokens_are_refused_when_the_layer_is_built(config: Any):
    from moe.integrations.vllm_method import MoeStagesMethod

    _, experts = build(config)
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size_per_partition": I}
    layer = type("Layer", (torch.nn.Module,), {"layer_name": "model.layers.3.mlp.experts"})()
    with pytest.raises(
        NotImplementedError, match=r"layers\.3.*params_dtype: expected bfloat16, as tokens, got float16"
    ):
        MoeStagesMethod(experts.moe_config).create_weights(layer, **sizes, params_dtype=torch.float16)


def test_a_hook_that_wants_rows_unsummed_is_refused(config: Any):
    _, experts = build(config)
    experts.quant_method.moe_kernel.fused_experts.post_gemm2_hook = lambda rows, output: output.zero_()
    x, ids, weights = inputs(3)
    with set_forward_context(None, config), pytest.raises(NotImplementedError, match="post_gemm2_hook"):
        call(experts, x, ids, weights)


def test_tokens_and_choices_that_are_slices_of_others_are_read_where_they_lie(config: Any):
    _, experts = build(config)
    x, ids, weights = inputs(9)
    apart = [torch.stack((value, torch.full_like(value, 7)), -1)[..., 0] for value in (x, ids, weights)]
    assert not any(value.is_contiguous() for value in apart)
    output = torch.full_like(x, float("nan"))
    kernel = experts.quant_method.moe_kernel.fused_experts
    names = ("a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta", "expert_map")
    for rows in (9, 1):
        of_rows = dict(zip(("hidden_states", "topk_ids", "topk_weights"), (value[:rows] for value in apart)))
        kernel.apply(
            output=output[:rows],
            w1=experts.w13_weight,
            w2=experts.w2_weight,
            activation=experts.activation,
            global_num_experts=E,
            apply_router_weight_on_input=False,
            **of_rows,
            **dict.fromkeys(names),
        )
        assert relative_error(output[:rows], expected(experts, x[:rows], ids[:rows], weights[:rows])) < 1e-2


FIELDS = {
    "another backend that was asked for": ("moe_backend", "triton", "moe_backend: expected auto, got triton"),
    "adapters": ("is_lora_enabled", True, "is_lora_enabled: expected False, got True"),
    "float16": ("in_dtype", torch.float16, "dtype: expected bfloat16, got float16"),
    "a gate of squared ReLU": ("activation", MoEActivation.RELU2, "activation: expected one of silu, .*, got relu2"),
    "situ without its numbers": ("activation", MoEActivation.SITU, "activation_situ_beta: expected a number with situ"),
    "no gate": ("activation", MoEActivation.GELU_TANH_NO_MUL, "activation: .*got gelu_tanh_no_mul"),
    "sizes": ("hidden_dim", 511, "hidden_size: .*511"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_cpu_cannot_build_is_told_by_field_too(config: Any, name: str, monkeypatch: pytest.MonkeyPatch):
    from moe.integrations.vllm_method import why_not_ours

    field, value, words = FIELDS[name]
    moe_config = build(config)[1].moe_config
    assert why_not_ours(moe_config) is None
    setattr(moe_config, field, value)
    assert re.search(words, str(why_not_ours(moe_config)))


@pytest.mark.parametrize("backend", ["deepep_low_latency", "nixl_ep", "flashinfer_nvlink_two_sided", "moonep"])
def test_exchanges_that_sort_or_send_tokens_themselves_stay_with_vllm(config: Any, backend: str):
    from moe.integrations.vllm_method import why_not_ours

    moe_config = build(config)[1].moe_config
    parallel = dataclasses.replace(moe_config.moe_parallel_config, use_ep=True, dp_size=2, all2all_backend=backend)
    moe_config.moe_parallel_config = parallel
    assert "parallel config" in str(why_not_ours(moe_config))
    parallel = dataclasses.replace(parallel, all2all_backend="allgather_reducescatter")
    moe_config.moe_parallel_config = parallel
    assert why_not_ours(moe_config) is None


def test_a_second_plug_in_of_the_same_place_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    from moe.integrations.vllm_method import register_method

    register_method()  # our own, again
    monkeypatch.setitem(op_registry_oot, "UnquantizedFusedMoEMethod", dict)
    with pytest.raises(RuntimeError, match="expected to be the only plug-in"):
        register_method()


def test_batch_invariance_is_promised_to_vllm_and_asked_of_the_layer(config: Any, monkeypatch: pytest.MonkeyPatch):
    import vllm.envs as envs

    from moe.integrations.vllm_method import layer_of

    moe_config = build(config)[1].moe_config
    assert not layer_of(moe_config).is_batch_invariant
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert layer_of(moe_config).is_batch_invariant
