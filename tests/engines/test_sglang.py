"""One real MoE layer of SGLang on a CPU, made by SGLang with the plug-in loaded as SGLang loads it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import install
from torch import Tensor

install()
pytest.importorskip("sglang")

from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES  # noqa: E402
from sglang.srt.layers.moe import utils as moe_utils  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher import standard  # noqa: E402
from sglang.srt.layers.moe.topk import PackedTopKOutput, StandardTopKOutput  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.runtime_context import get_flags, get_parallel  # noqa: E402
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler  # noqa: E402

from moe.testing.closeness import relative_error  # noqa: E402

E, K, H, I = 8, 2, 64, 48  # noqa: E741
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "num_experts": E,
    "num_experts_per_tok": K,
    "moe_intermediate_size": I,
    "intermediate_size": I,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    load_plugins()
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    args = ServerArgs(model_path=str(folder), device="cpu", moe_runner_backend="moe_stages", disable_cuda_graph=True)
    set_global_server_args_for_scheduler(args)
    moe_utils.initialize_moe_config()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with get_parallel().override(moe_ep_rank=0, moe_tp_rank=0, tp_rank=0):
        yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU SGLang runs plain torch and asks no runner; what it runs on a GPU is what is tested."""
    try:
        import sglang.kernels.fused_op as fused_op
    except ImportError:
        import sglang.srt.layers.utils.multi_platform as fused_op
    monkeypatch.setattr(fused_op, "_platform_key", lambda: "cuda")
    monkeypatch.setattr(standard, "get_device", lambda *_: "cpu")


def build(**more: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    torch.manual_seed(0)
    arguments = {"num_experts": E, "hidden_size": H, "intermediate_size": I, "layer_id": 3, "top_k": K}
    layer = FusedMoE(**arguments | more)
    with torch.no_grad():
        for name, scale in (("w13_weight", 8), ("w2_weight", 7)):
            weight = getattr(layer, name)
            weight.copy_(torch.randn(weight.shape) / scale)
        if more.get("with_bias"):
            for bias in (layer.w13_weight_bias, layer.w2_weight_bias):
                bias.copy_(torch.randn(bias.shape))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2)
    return torch.nn.functional.silu(gate) * up


def expected(layer: Any, x: Tensor, ids: Tensor, weights: Tensor, first: int = 0, act: Any = silu) -> Tensor:
    """In float64, expert by expert, of the experts from `first` on that are here."""
    w1, w2 = layer.w13_weight.double(), layer.w2_weight.double()
    names = ("w13_weight_bias", "w2_weight_bias")
    b1, b2 = (getattr(layer, name, torch.zeros(len(w1), 1)).double() for name in names)
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].double()):
            if 0 <= expert - first < len(w1):
                here = expert - first
                row = w2[here] @ act(w1[here] @ x[token].double() + b1[here]) + b2[here]
                result[token] += weight * row
    return result


def inputs(num_tokens: int, top_k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, E).argsort(1)[:, :top_k].int().contiguous()
    return torch.randn(num_tokens, H), ids, torch.rand(num_tokens, top_k, dtype=torch.float32)


def call(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    logits = torch.zeros(len(x), E)
    dispatched = layer.dispatcher.dispatch(x.clone(), StandardTopKOutput(weights, ids, logits))
    return layer.quant_method.apply(layer, dispatched).hidden_states


def test_the_name_is_a_choice_of_the_command_line_and_a_second_load_changes_nothing():
    from moe.integrations.plugins.sglang import plugin

    assert MOE_RUNNER_BACKEND_CHOICES.count("moe_stages") == 1
    plugin()
    assert MOE_RUNNER_BACKEND_CHOICES.count("moe_stages") == 1


def test_a_server_that_did_not_ask_pays_nothing_for_the_name():
    code = (
        "import sys, time, stubs; stubs.install()\n"
        "import sglang.srt.server_args, sglang.srt.plugins.hook_registry, sglang.srt.arg_groups.choices\n"
        "before, start = set(sys.modules), time.thread_time()\n"
        "from moe.integrations.plugins.sglang import plugin\n"
        "plugin()\n"
        "taken = time.thread_time() - start\n"
        "own = ('moe.integrations', 'moe.integrations.plugins', 'moe.integrations.plugins.sglang')\n"
        "new = [name for name in set(sys.modules) - before if name.startswith(('sglang', 'moe.'))]\n"
        "print([name for name in new if name not in own], taken < 0.010, taken)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.stdout.startswith("[] True"), run.stdout + run.stderr


def test_a_layer_is_built_with_our_runner():
    layer = build()
    assert type(layer.runner.runner_core).__name__ == "MoeStagesRunnerCore"
    assert layer.quant_method.runner is layer.runner


@pytest.mark.parametrize("num_tokens", [1, 7, 65])
def test_a_layer_is_right(num_tokens: int):
    layer = build()
    x, ids, weights = inputs(num_tokens)
    assert relative_error(call(layer, x, ids, weights), expected(layer, x, ids, weights)) < 1e-2


def test_padding_ids_are_skipped():
    layer = build()
    x, ids, weights = inputs(9)
    ids[4] = -1
    x[4] = float("nan")
    output = call(layer, x, ids, weights)
    assert not output[4].any()
    x[4] = 0
    assert relative_error(output, expected(layer, x, ids, weights)) < 1e-2


def test_no_tokens_give_no_rows():
    assert call(build(), *inputs(0)).shape == (0, H)


@pytest.mark.parametrize("rank", range(4))
def test_slices_of_experts_are_right(rank: int):
    sizes = {"tp_size": 4, "attn_tp_size": 4, "moe_ep_size": 4, "moe_tp_size": 1}
    with get_parallel().override(**sizes, moe_ep_rank=rank, tp_rank=rank):
        layer = build()
        x, ids, weights = inputs(20)
        assert len(layer.w13_weight) == 2
        output = call(layer, x, ids, weights)
    assert relative_error(output, expected(layer, x, ids, weights, first=2 * rank)) < 1e-2


def test_a_scale_of_the_routed_experts_is_applied():
    layer = build(routed_scaling_factor=2.5)
    x, ids, weights = inputs(9)
    assert relative_error(call(layer, x, ids, weights), expected(layer, x, ids, weights * 2.5)) < 1e-2


def test_weights_on_the_input_are_applied_once():
    layer = build(top_k=1, apply_router_weight_on_input=True)
    x, ids, weights = inputs(9, top_k=1)
    exact = expected(layer, x * weights.bfloat16(), ids, torch.ones_like(weights))
    assert relative_error(call(layer, x, ids, weights), exact) < 1e-2


def test_weights_on_the_input_go_into_each_choice_and_a_scale_onto_the_result():
    layer = build(top_k=K, apply_router_weight_on_input=True, routed_scaling_factor=2.5)
    x, ids, weights = inputs(9)
    slots = [
        expected(layer, x * weights[:, k : k + 1].bfloat16(), ids[:, k : k + 1], torch.ones(9, 1)) for k in range(K)
    ]
    assert relative_error(call(layer, x, ids, weights), 2.5 * sum(slots)) < 1e-2


def test_a_limit_of_swiglu_clamps():
    def clamped(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2)
        return torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)

    layer = build(swiglu_limit=0.5)
    x, ids, weights = inputs(9)
    assert relative_error(call(layer, x, ids, weights), expected(layer, x, ids, weights, act=clamped)) < 1e-2


def test_swiglu_with_alpha_on_halves_is_right():
    def with_alpha(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2)
        gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    layer = build(gemm1_alpha=1.702, gemm1_clamp_limit=0.7, gate_up_interleaved=False)
    x, ids, weights = inputs(9)
    assert relative_error(call(layer, x, ids, weights), expected(layer, x, ids, weights, act=with_alpha)) < 1e-2


def gpt_oss(rows: Tensor) -> Tensor:
    gate, up = rows[::2].clamp(max=7), rows[1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def test_a_layer_of_gpt_oss_is_right():
    layer = build(with_bias=True, gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    x, ids, weights = inputs(9)
    ids[3] = -1
    output = call(layer, x, ids, weights)
    assert relative_error(output, expected(layer, x, ids, weights, act=gpt_oss)) < 1e-2
    assert not output[3].any()


def halves(function: Any) -> Any:
    return lambda rows: function(*rows.chunk(2))


F = torch.nn.functional
GATES = {
    "gelu": ({"activation": "gelu"}, halves(lambda gate, up: F.gelu(gate) * up)),
    "gelu_tanh": ({"activation": "gelu_tanh"}, halves(lambda gate, up: F.gelu(gate, approximate="tanh") * up)),
    "a clamp after silu": (
        {"gemm1_clamp_limit": 0.5},
        halves(lambda gate, up: F.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5)),
    ),
    "situ": (
        {"activation": "situ", "gemm1_clamp_limit": 2.0},
        halves(lambda gate, up: 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 2 * torch.tanh(up / 2)),
    ),
    "gelu without a gate": ({"activation": "gelu", "is_gated": False}, F.gelu),
}


@pytest.mark.parametrize("name", GATES)
def test_other_activations_are_right(name: str):
    arguments, act = GATES[name]
    layer = build(**arguments)
    x, ids, weights = inputs(9)
    assert relative_error(call(layer, x, ids, weights), expected(layer, x, ids, weights, act=act)) < 1e-2


def test_squared_relu_without_a_gate_is_right():
    layer = build(activation="relu2", is_gated=False)
    x, ids, weights = inputs(9)
    exact = expected(layer, x, ids, weights, act=lambda rows: rows.relu().square())
    assert relative_error(call(layer, x, ids, weights), exact) < 1e-2


def test_weights_rewritten_in_place_are_read():
    layer = build()
    x, ids, weights = inputs(6)
    first = call(layer, x, ids, weights).clone()
    with torch.no_grad():
        layer.w2_weight.mul_(2)
    assert torch.equal(call(layer, x, ids, weights), first * 2)


REFUSED = {
    "activation": ({"activation": "silu_rounded"}, "activation: expected silu, gelu, .* with is_gated"),
    "alpha alone": ({"gemm1_alpha": 1.702}, "gemm1_alpha: expected gemm1_clamp_limit with it"),
    "alpha of gelu": ({"activation": "gelu", "gemm1_alpha": 1.702}, "gemm1_alpha: expected None but for silu"),
    "situ without up's number": ({"activation": "situ"}, "gemm1_clamp_limit: expected a number with situ, got None"),
    "two limits": (
        {"gemm1_clamp_limit": 7.0, "swiglu_limit": 7.0},
        "swiglu_limit: expected None with gemm1_clamp_limit",
    ),
    "beta alone": ({"gemm1_beta": 0.5}, r"gemm1_beta: expected None without gemm1_alpha, got 0\.5"),
    "limit of 0": ({"swiglu_limit": 0.0}, r"limit of the gate: expected a positive number, got 0\.0"),
    "number of situ": (
        {"activation": "situ", "gemm1_clamp_limit": 0.0},
        r"beta of situ: expected a positive number, got 0\.0",
    ),
    "unsummed": ({"no_combine": True}, "no_combine: expected False, got True"),
    "float16": ({"params_dtype": torch.float16}, "dtype: expected bfloat16, got float16"),
    "sizes": ({"intermediate_size": 44}, "intermediate_size: .*44"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_not_ours_is_refused_when_it_is_built(name: str):
    more, words = REFUSED[name]
    with pytest.raises(NotImplementedError, match=rf"MoE layer 3: {words}"):
        build(**more)


def test_a_quantised_layer_is_refused_when_it_is_built():
    from moe.integrations.plugins.sglang import _expect_ours

    layer = build()
    layer.quant_method = type("Fp8MoEMethod", (torch.nn.Module,), {})()
    with pytest.raises(NotImplementedError, match=r"MoE layer 3: quant_method: .* got Fp8MoEMethod"):
        _expect_ours(None, layer)


def test_a_quantised_layer_with_our_runner_is_refused_when_it_is_built():
    from moe.integrations.plugins.sglang import _expect_ours

    layer = build()
    layer.quant_method = type("ModelOptNvFp4FusedMoEMethod", (torch.nn.Module,), {"runner": layer.runner})()
    with pytest.raises(NotImplementedError, match=r"expected an unquantised layer .* got ModelOptNvFp4"):
        _expect_ours(None, layer)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fused_shared_experts_are_right(num_ranks: int):
    x, ids, weights = inputs(9)
    ids = torch.cat((ids, torch.full((9, 1), E, dtype=torch.int32)), 1)
    weights = torch.cat((weights, torch.full((9, 1), 0.4, dtype=torch.float32)), 1)
    for rank in range(num_ranks):
        sizes = {"tp_size": num_ranks, "attn_tp_size": num_ranks, "moe_ep_size": num_ranks, "moe_tp_size": 1}
        with get_parallel().override(**sizes, moe_ep_rank=rank, tp_rank=rank):
            layer = build(num_experts=E + 1, num_fused_shared_experts=1, top_k=K + 1, routed_scaling_factor=2.5)
            output = call(layer, x, ids, weights)
        routed = E // num_ranks
        place = torch.where(ids == E, routed, ids - rank * routed)
        place[(ids < E) & ((place < 0) | (place >= routed))] = -1
        assert relative_error(output, expected(layer, x, place, weights * 2.5)) < 1e-2


def test_a_runner_that_the_hook_did_not_replace_is_noticed():
    from sglang.srt.layers.moe.moe_runner import MoeRunner

    from moe.integrations.plugins.sglang import _expect_ours

    layer = build()
    layer.quant_method.runner = MoeRunner(moe_utils.MoeRunnerBackend.TRITON, layer.moe_runner_config)
    with pytest.raises(NotImplementedError, match="expected an unquantised layer of experts"):
        _expect_ours(None, layer)


@pytest.mark.parametrize("hook", ["after_gate_up", "after_down"])
def test_adapters_are_refused(hook: str):
    core = build().runner.runner_core
    x, ids, weights = inputs(2)
    dispatched = build().dispatcher.dispatch(x, StandardTopKOutput(weights, ids, None))
    hooks = type("Hooks", (), {"after_gate_up": None, "after_down": None})()
    setattr(hooks, hook, len)
    with pytest.raises(NotImplementedError, match="no adapters of experts"):
        core.run_from_dispatch(dispatched, None, core.config, hooks=hooks)


def test_what_only_a_call_shows_is_refused():
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo

    layer = build()
    core = layer.runner.runner_core
    x, ids, weights = inputs(2)
    dispatched = layer.dispatcher.dispatch(x, StandardTopKOutput(weights, ids, None))
    info = TritonMoeQuantInfo(layer.w13_weight, layer.w2_weight)
    info = dataclasses.replace(info, fuse_swiglu_interleaved=True)
    with pytest.raises(NotImplementedError, match="moe_stages: fuse_swiglu_interleaved"):
        core.run_from_dispatch(dispatched, info, core.config)
    packed = layer.dispatcher.dispatch(x, StandardTopKOutput(weights, ids, None))._replace(
        topk_output=PackedTopKOutput(ids, None)
    )
    with pytest.raises(NotImplementedError, match="moe_stages: topk_output: expected ids and weights, got"):
        core.run_from_dispatch(packed, dataclasses.replace(info, fuse_swiglu_interleaved=False), core.config)


def test_other_backends_are_left_alone():
    moe = get_flags().moe
    ours, moe.runner_backend = moe.runner_backend, moe_utils.MoeRunnerBackend.TRITON
    try:
        assert type(build().runner.runner_core).__name__ == "TritonRunnerCore"
    finally:
        moe.runner_backend = ours


def test_a_model_compiled_for_one_token_keeps_our_runner():
    assert build().quant_method._torch_compile_forward(1) is None


def test_a_release_that_was_not_tried_adds_no_choice(monkeypatch: pytest.MonkeyPatch):
    import moe.integrations.plugins.sglang as module

    MOE_RUNNER_BACKEND_CHOICES.remove("moe_stages")
    monkeypatch.setattr(module, "_installed", lambda: "0.5.99")
    try:
        with pytest.raises(RuntimeError, match=re.escape("got 0.5.99")):
            module.plugin()
        assert "moe_stages" not in MOE_RUNNER_BACKEND_CHOICES
    finally:
        MOE_RUNNER_BACKEND_CHOICES.append("moe_stages")
