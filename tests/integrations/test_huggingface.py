"""Hugging Face models whose experts run on our pipeline, against their own experts and float64."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe import operators
from moe.expert_ids import ID_DTYPES
from moe.flow import TopK
from moe.gemm.config import ActivationType
from moe.integrations import hf_call
from moe.integrations.huggingface import check_model, register, use_moe
from moe.testing.closeness import assert_close_to_exact, relative_error
from moe.testing.problems import experts_in_float64

pytest.importorskip("transformers", minversion="5.7")
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations import moe as transformers_moe

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 72, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 48, "num_experts": 12, "num_experts_per_tok": 5, "norm_topk_prob": False},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def fill(model: nn.Module, *, seed: int = 0) -> None:
    """Weights and router biases of 0.2: transformers' own are too small to tell experts apart, and its biases are 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [p for p in model.parameters() if p.dim() > 1]
    tensors += [b for name, b in model.named_buffers() if "bias" in name]
    for tensor in tensors:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


def build_model(model_type: str, device: torch.device = torch.device("cpu"), **settings: object) -> nn.Module:
    config = AutoConfig.for_model(model_type, **SMALL | FAMILIES.get(model_type, {}) | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="eager")
    fill(model)
    return model.eval().to(device)


def tokens_for(device: torch.device) -> Tensor:
    return torch.randint(1, 96, (3, 11), generator=torch.Generator().manual_seed(1)).to(device)


def experts_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "has_bias") and hasattr(module, "down_proj")]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]]]:
    """(experts, hidden_states, ids, weights, output) of every call to an experts module."""
    calls: list = []
    hooks = [
        experts.register_forward_hook(
            lambda module, args, output: calls.append((module, *(a.clone() for a in args), output))
        )
        for experts in experts_in(model)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def routed_as(model: nn.Module, calls: list) -> Iterator[None]:
    """Experts get the ids and weights of `calls`: else a rounding that flips a near tie hides every other error."""
    hooks = [
        experts.register_forward_pre_hook(lambda module, args, ids=call[2], weights=call[3]: (args[0], ids, weights))
        for experts, call in zip(experts_in(model), calls)
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture
def our_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs of our experts function."""
    outputs = []
    run = hf_call._run_experts

    def counted(*args: object) -> Tensor:
        outputs.append(run(*args))
        return outputs[-1]

    monkeypatch.setattr(hf_call, "_run_experts", counted)
    return outputs


@torch.no_grad()
def test_logits_are_as_close_to_float64_as_with_the_models_own_experts(
    family: str, device: torch.device, our_calls: list[Tensor]
) -> None:
    model, tokens = build_model(family, device), tokens_for(device)
    exact_model = copy.deepcopy(model).double()
    with recorded(model) as calls:
        eager = model(tokens).logits
    with routed_as(exact_model, calls):
        exact = exact_model(tokens).logits
    assert not our_calls
    use_moe(model)
    with routed_as(model, calls):
        ours = model(tokens).logits
    assert len(our_calls) == len(calls) == 2
    assert relative_error(ours, exact) <= 1.2 * relative_error(eager, exact)
    assert relative_error(ours, exact) <= 2e-2


@torch.no_grad()
def test_each_experts_module_is_as_close_to_float64_as_its_own_code(family: str, device: torch.device) -> None:
    model = use_moe(build_model(family, device))
    with recorded(model) as calls:
        model(tokens_for(device))
    model.set_experts_implementation("eager")
    assert len(calls) == 2
    for experts, hidden_states, ids, weights, ours in calls:
        eager = experts(hidden_states, ids, weights)
        exact = experts_in_float64(TopK(ids, weights), hidden_states, experts.gate_up_proj, experts.down_proj)
        assert ours.dtype == torch.bfloat16
        assert_close_to_exact(ours, eager, exact)


@torch.no_grad()
def test_nemotron_h_runs_its_ungated_experts_on_us(device: torch.device, our_calls: list[Tensor]) -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    if not hasattr(modeling, "NemotronHExperts"):
        pytest.skip("this transformers has no NemotronHExperts")
    config = AutoConfig.for_model(
        "nemotron_h", hidden_size=64, moe_intermediate_size=40, n_routed_experts=6, num_experts_per_tok=3
    )
    experts = modeling.NemotronHExperts(config).to(torch.bfloat16)
    fill(experts)
    experts.to(device)
    register()
    experts.config._experts_implementation = "moe"
    hidden_states, ids, weights = routed_tokens(experts, 13, top_k=3)
    ours = experts(hidden_states, ids, weights)
    experts.config._experts_implementation = "eager"
    eager = experts(hidden_states, ids, weights)
    exact = experts_in_float64(
        TopK(ids, weights), hidden_states, experts.up_proj, experts.down_proj, activation=ActivationType.Relu2
    )
    assert len(our_calls) == 1
    assert_close_to_exact(ours, eager, exact)


@torch.no_grad()
def test_generate_runs_every_step_on_us(our_calls: list[Tensor]) -> None:
    model = use_moe(build_model("qwen3_moe"))
    tokens = model.generate(tokens_for(model.device), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (3, 15)
    assert len(our_calls) == 4 * 2


@torch.no_grad()
def test_loading_by_name_runs_on_us(our_calls: list[Tensor]) -> None:
    register("moe")
    config = AutoConfig.for_model("mixtral", **SMALL | FAMILIES["mixtral"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="moe").eval()
    check_model(model)
    model(tokens_for(model.device))
    assert len(our_calls) == 2


class Config:
    _experts_implementation = "moe"


def make_experts(device: torch.device = torch.device("cpu"), **flags: bool) -> nn.Module:
    """Experts of E=5, H=32, I=24 in the layout that the flags of transformers' decorator say."""
    register()
    is_transposed = flags.get("is_transposed", False)

    class TinyExperts(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.num_experts = 5
            self.act_fn = nn.SiLU()
            has_gate = flags.get("has_gate", True)
            rows = 48 if has_gate else 24
            shapes = ((5, 32, rows), (5, 24, 32)) if is_transposed else ((5, rows, 32), (5, 32, 24))
            first, self.down_proj = (nn.Parameter(torch.empty(shape)) for shape in shapes)
            setattr(self, "gate_up_proj" if has_gate else "up_proj", first)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("the eager experts ran")

    experts = transformers_moe.use_experts_implementation(**flags)(TinyExperts)(Config())
    fill(experts)
    return experts.to(device, torch.bfloat16).requires_grad_(False)


def routed_tokens(experts: nn.Module, num_tokens: int, *, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    device, num_experts = experts.down_proj.device, experts.down_proj.shape[0]
    hidden_size = experts.down_proj.shape[2 if experts.is_transposed else 1]
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.rand(num_tokens, max(num_experts, top_k), generator=generator).argsort(1)[:, :top_k] % num_experts
    weights = torch.rand(num_tokens, top_k, generator=generator)
    return hidden_states.to(device), ids.to(device), weights.to(device)


def exact_of(experts: nn.Module, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    w1, w2 = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        w1, w2 = w1.mT, w2.mT
    return experts_in_float64(TopK(ids, weights), hidden_states, w1, w2)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "transposed"])
def test_both_weight_layouts_are_read_where_they_lie(
    is_transposed: bool, num_tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_experts(device, is_transposed=is_transposed)
    inputs = routed_tokens(experts, num_tokens)
    seen = []
    run = hf_call._run_experts
    monkeypatch.setattr(hf_call, "_run_experts", lambda *args: (seen.append(args[3:5]), run(*args))[1])
    output = experts(*inputs)
    assert output.shape == (num_tokens, 32)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, exact_of(experts, *inputs)) <= 6e-3
    assert [w.data_ptr() for w in seen[0]] == [experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr()]


@pytest.mark.parametrize("absent", [5, 6, -1, 2**31, 2**32, 2**32 + 1, -(2**32)])
def test_ids_of_no_expert_here_are_skipped(absent: int, device: torch.device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 9)
    ids[::2, 1] = absent
    ids[4] = absent
    output = experts(hidden_states, ids, weights)
    exact = exact_of(experts, hidden_states, ids, weights)
    assert relative_error(output, exact) <= 6e-3
    assert not output[4].any()


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_every_integer_dtype_gives_the_result_of_int64(dtype: torch.dtype, device: torch.device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 9)
    ids[3, 0] = 100  # no expert, in every dtype
    expected = experts(hidden_states, ids, weights)
    assert expected.any(dim=1).all()
    assert torch.equal(experts(hidden_states, ids.to(dtype), weights), expected)


@pytest.mark.parametrize("largest", [2**16 - 1, 2**32 - 1, 2**63 - 1, -1], ids=str)
def test_the_largest_number_of_a_dtype_is_no_expert(largest: int, device: torch.device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 9)
    dtype = {2**16 - 1: torch.uint16, 2**32 - 1: torch.uint32}.get(largest, torch.uint64)
    ids[3], ids[4, 0] = largest, largest
    output = experts(hidden_states, ids.to(dtype), weights)
    assert not output[3].any()
    assert torch.equal(output, experts(hidden_states, ids.clamp(-1, 5), weights))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_small_ids_of_more_experts_than_int8_numbers(dtype: torch.dtype) -> None:
    experts = make_experts()
    ours = {name: getattr(experts, name).data.repeat(40, 1, 1) for name in ("gate_up_proj", "down_proj")}
    for name, weights in ours.items():
        setattr(experts, name, nn.Parameter(weights, requires_grad=False))
    experts.num_experts = 200
    hidden_states, ids, weights = routed_tokens(experts, 9)
    ids %= torch.iinfo(dtype).max
    assert torch.equal(experts(hidden_states, ids.to(dtype), weights), experts(hidden_states, ids, weights))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_ids_that_are_no_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    experts = make_experts()
    hidden_states, ids, weights = routed_tokens(experts, 3)
    with pytest.raises(
        ValueError, match=rf"expected top_k_index \[T, K\] of an integer dtype, got {dtype}; pass the ids"
    ):
        experts(hidden_states, ids.to(dtype), weights)


def test_weights_that_are_whole_numbers_are_refused() -> None:
    experts = make_experts()
    hidden_states, ids, _ = routed_tokens(experts, 3)
    with pytest.raises(ValueError, match=r"expected top_k_weights \[T, K\] of a floating dtype, got torch.int64"):
        experts(hidden_states, ids, ids)


def test_a_nan_token_stays_in_its_row(device: torch.device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 9)
    clean = experts(hidden_states, ids, weights)
    hidden_states[3] = float("nan")
    output = experts(hidden_states, ids, weights)
    assert output[3].isnan().all()
    others = torch.arange(9, device=device) != 3
    assert torch.equal(output[others], clean[others])


def test_expert_parallel_calls_with_one_choice_or_more_choices_than_experts(device: torch.device) -> None:
    experts = make_experts(device)
    for top_k in (1, 7):
        inputs = routed_tokens(experts, 9, top_k=top_k)
        inputs[1][2:5, 0] = experts.num_experts
        assert relative_error(experts(*inputs), exact_of(experts, *inputs)) <= 6e-3


def test_leading_dimensions_and_strides_do_not_matter(device: torch.device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 12)
    flat = experts(hidden_states, ids, weights)
    wide = torch.empty(4, 3, 64, dtype=torch.bfloat16, device=device)[..., ::2]
    wide.copy_(hidden_states.view(4, 3, 32))
    assert torch.equal(experts(wide, ids, weights), flat.view(4, 3, 32))
    assert torch.equal(experts(hidden_states, ids.mT.contiguous().mT, weights.double()), flat)


def test_a_compiled_model_calls_us_without_a_graph_break(device: torch.device) -> None:
    experts = make_experts(device)
    inputs = routed_tokens(experts, 6)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), experts(*inputs))


@pytest.mark.parametrize("offset", [8, 2, 1])
def test_weights_mapped_from_a_file_may_begin_anywhere(offset: int, tmp_path: Path) -> None:
    experts = make_experts()
    inputs = routed_tokens(experts, 7)
    expected = experts(*inputs)
    for name in ("gate_up_proj", "down_proj"):
        weights = getattr(experts, name).data
        file = tmp_path / name
        file.write_bytes(bytes(offset) + weights.view(torch.int16).numpy().tobytes())
        mapped = torch.from_numpy(np.memmap(file, mode="c"))[offset:].view(torch.uint8)
        mapped = torch.frombuffer(mapped.numpy(), dtype=torch.bfloat16).view(weights.shape)
        assert mapped.data_ptr() % 16 == offset
        setattr(experts, name, nn.Parameter(mapped, requires_grad=False))
    assert torch.equal(experts(*inputs), expected)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (
            "has_bias",
            True,
            r"TinyExperts.gate_up_proj_bias: expected a tensor, got NoneType; leave this model on another",
        ),
        ("has_post_expert_norm", True, r"post_expert_norm: expected a module, got NoneType"),
        ("act_fn", None, r"act_fn: expected a function, got NoneType"),
        ("has_gate", False, r"up_proj: expected a tensor, got NoneType"),
    ],
    ids=lambda value: str(value)[:22],
)
def test_experts_that_lack_something_are_refused(attribute: str, value: object, message: str) -> None:
    experts = make_experts()
    setattr(experts, attribute, value)
    with pytest.raises(ValueError, match=message):
        use_moe(experts)


def interleaved(self: nn.Module, gate_up: Tensor) -> Tensor:
    return torch.tanh(gate_up[..., ::2]) * gate_up[..., 1::2]


@torch.no_grad()
@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "transposed"])
def test_biases_and_a_gate_that_no_kernel_has_run_between_two_matrices(
    is_transposed: bool, is_batch_invariant: bool, device: torch.device
) -> None:
    experts = make_experts(device, is_transposed=is_transposed, has_bias=True, is_concatenated=False)
    type(experts)._apply_gate = interleaved
    for name, size in (("gate_up_proj_bias", 48), ("down_proj_bias", 32)):
        bias = torch.randn(5, size, generator=torch.Generator().manual_seed(size)) * 0.2
        setattr(experts, name, nn.Parameter(bias.to(device, torch.bfloat16), requires_grad=False))
    hidden_states, ids, weights = routed_tokens(experts, 9)
    ids[2, 0], ids[3] = 5, -1
    w1, w2 = (experts.gate_up_proj, experts.down_proj)
    w1, w2 = (w1.mT, w2.mT) if is_transposed else (w1, w2)
    exact = torch.zeros(9, 32, dtype=torch.float64, device=device)
    for token, choice in ((t, k) for t in range(9) for k in range(2) if 0 <= ids[t, k] < 5):
        e = ids[token, choice]
        x = w1[e].double() @ hidden_states[token].double() + experts.gate_up_proj_bias[e].double()
        row = w2[e].double() @ interleaved(experts, x) + experts.down_proj_bias[e].double()
        exact[token] += weights[token, choice].double() * row
    use_moe(experts, f"moe-apart-{is_batch_invariant}", is_batch_invariant=is_batch_invariant)
    output = experts(hidden_states, ids, weights)
    assert relative_error(output, exact) <= 1e-2
    assert not output[3].any()
    assert experts(hidden_states[:0], ids[:0], weights[:0]).shape == (0, 32)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden_states, ids, weights), output)


def experts_one_by_one(experts: nn.Module, between: Any, *inputs: Tensor) -> Tensor:
    """The sum of chosen experts in float64; `between` makes of what the first matrix gives what the second one takes."""
    hidden_states, ids, weights = inputs
    w1 = experts.gate_up_proj if experts.has_gate else experts.up_proj
    w1, w2 = (w1.mT, experts.down_proj.mT) if experts.is_transposed else (w1, experts.down_proj)
    exact = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for token, choice in ((t, k) for t in range(len(ids)) for k in range(ids.shape[1])):
        e = ids[token, choice]
        row = between(w1[e].double() @ hidden_states[token].double(), e)
        exact[token] += weights[token, choice].double() * (w2[e].double() @ row)
    return exact


@torch.no_grad()
@pytest.mark.parametrize(
    ("act_fn", "is_fused"),
    [
        (nn.GELU(approximate="tanh"), True),
        (nn.GELU(), True),
        (ACT2FN["gelu"], True),
        (ACT2FN["gelu_pytorch_tanh"], True),
        (ACT2FN["gelu_new"], True),
        (nn.Mish(), False),
        (nn.functional.relu, False),
        (ACT2FN["quick_gelu"], False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gates_that_the_kernels_have_run_on_them_and_others_between_two_matrices(
    device: torch.device, our_calls: list[Tensor], act_fn: Any, is_fused: bool
) -> None:
    experts = make_experts(device)
    del experts.act_fn
    experts.act_fn = act_fn
    inputs = routed_tokens(experts, 9)
    output = use_moe(experts)(*inputs)

    def between(product: Tensor, _: Tensor) -> Tensor:
        gate, up = product.chunk(2)
        return act_fn(gate) * up

    assert relative_error(output, experts_one_by_one(experts, between, *inputs)) <= 1e-2
    assert len(our_calls) == is_fused


@torch.no_grad()
@pytest.mark.parametrize(
    ("act_fn", "is_fused"),
    [
        (nn.SiLU(), True),
        (nn.GELU(), True),
        (nn.GELU(approximate="tanh"), False),
        (nn.ReLU(), True),
        (ACT2FN["relu2"], True),
        (nn.Identity(), True),
        (nn.Tanh(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_experts_without_a_gate(device: torch.device, our_calls: list[Tensor], act_fn: Any, is_fused: bool) -> None:
    experts = make_experts(device, has_gate=False)
    del experts.act_fn
    experts.act_fn = act_fn
    inputs = routed_tokens(experts, 9)
    output = use_moe(experts)(*inputs)
    exact = experts_one_by_one(experts, lambda product, _: act_fn(product), *inputs)
    assert relative_error(output, exact) <= 1e-2
    assert len(our_calls) == is_fused


def clamped(self: nn.Module, gate_up: Tensor) -> Tensor:
    """As gpt-oss."""
    gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
    return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "transposed"])
def test_biases_and_interleaved_gates_run_on_the_kernels(
    device: torch.device, our_calls: list[Tensor], is_transposed: bool, is_batch_invariant: bool, dtype: torch.dtype
) -> None:
    experts = make_experts(device, is_transposed=is_transposed, has_bias=True, is_concatenated=False)
    type(experts)._apply_gate = clamped
    experts.limit, experts.alpha = 1.5, 1.7
    for name, size in (("gate_up_proj_bias", 48), ("down_proj_bias", 32)):
        bias = torch.randn(5, size, generator=torch.Generator().manual_seed(size)) * 0.7
        setattr(experts, name, nn.Parameter(bias.to(device, dtype), requires_grad=False))
    hidden_states, ids, weights = routed_tokens(experts, 9)

    def between(product: Tensor, expert: Tensor) -> Tensor:
        return clamped(experts, product + experts.gate_up_proj_bias[expert].double())

    exact = experts_one_by_one(experts, between, hidden_states, ids, weights)
    exact += (weights[..., None].double() * experts.down_proj_bias[ids].double()).sum(1)
    use_moe(experts, f"moe-biases-{is_batch_invariant}", is_batch_invariant=is_batch_invariant)
    output = experts(hidden_states, ids, weights)
    assert relative_error(output, exact) <= 1e-2
    assert len(our_calls) == 1
    torch.compiler.reset()  # each class whose gate is tried is another program
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden_states, ids, weights), output)
    ids[3] = 5
    assert not experts(hidden_states, ids, weights)[3].any(), "what is skipped gets no bias"


def test_biases_that_need_a_gradient_get_one_and_those_of_another_dtype_are_refused() -> None:
    experts = make_experts(has_bias=True)
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(5, 48).bfloat16())
    experts.down_proj_bias = nn.Parameter(torch.zeros(5, 32).bfloat16(), requires_grad=False)
    use_moe(experts)
    experts(*routed_tokens(experts, 3)).float().sum().backward()
    assert experts.gate_up_proj_bias.grad.any()
    with torch.no_grad():
        assert experts(*routed_tokens(experts, 3)).shape == (3, 32)
        experts.down_proj_bias.data = experts.down_proj_bias.data.half()
        with pytest.raises(ValueError, match=r"down_proj_bias in bfloat16 or float32, got torch\.float16"):
            experts(*routed_tokens(experts, 3))


@pytest.mark.parametrize("model", [None, "Qwen/Qwen3-30B-A3B"])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match=f"model: expected a transformers model, got {type(model).__name__}"):
        use_moe(model)


@pytest.mark.parametrize(
    "act_fn",
    [nn.SiLU(), nn.functional.silu, ACT2FN["silu"], ACT2FN["swish"]],
    ids=["module", "function", "ACT2FN-silu", "ACT2FN-swish"],
)
def test_silu_is_known_in_its_forms(act_fn: object) -> None:
    experts = make_experts()
    del experts.act_fn
    experts.act_fn = act_fn
    assert experts(*routed_tokens(experts, 3)).shape == (3, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_model_in_another_dtype_is_refused(dtype: torch.dtype) -> None:
    experts = make_experts().to(dtype)
    hidden_states, ids, weights = routed_tokens(experts, 3)
    with pytest.raises(ValueError, match=r"in bfloat16, got torch\.float.*dtype=torch\.bfloat16"):
        experts(hidden_states.to(dtype), ids, weights)


def test_weights_that_are_no_plain_tensor_are_refused() -> None:
    class Packed(Tensor):
        pass

    experts = make_experts()
    experts.down_proj = nn.Parameter(experts.down_proj.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(ValueError, match="expected down_proj to be a plain tensor, got Packed"):
        experts(*routed_tokens(make_experts(), 3))


def test_a_freshly_loaded_model_runs_with_gradients_and_without() -> None:
    model = use_moe(build_model("mixtral"))
    assert model(tokens_for(model.device)).logits.requires_grad
    with torch.inference_mode():
        assert model(tokens_for(model.device)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["hidden_states", "gate_up_proj", "down_proj"])
def test_each_tensor_that_asks_for_a_gradient_gets_one(name: str) -> None:
    experts = make_experts()
    inputs = routed_tokens(experts, 3)
    tensor = inputs[0] if name == "hidden_states" else getattr(experts, name)
    tensor.requires_grad_()
    with torch.no_grad():
        expected = experts(*inputs)
    output = experts(*inputs)
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    assert tensor.grad.isfinite().all()
    assert tensor.grad.any()


def test_a_model_that_ignores_experts_implementation_is_refused() -> None:
    class OwnExperts(nn.Module):
        pass

    model = build_model("mixtral")
    model.model.layers[1].mlp.experts = OwnExperts()
    with pytest.raises(ValueError, match="MixtralForCausalLM runs its OwnExperts itself and ignores"):
        use_moe(model)
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("moe")
    with pytest.raises(ValueError, match="OwnExperts itself"):
        check_model(model)


def test_a_model_without_experts_is_refused() -> None:
    model = build_model("llama", intermediate_size=48)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: expected experts that .* found none"):
        use_moe(model)


@torch.no_grad()
def test_gpt_oss_gives_the_logits_of_its_own_experts(device: torch.device, our_calls: list[Tensor]) -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16}
    model, tokens = build_model("gpt_oss", device, **settings), tokens_for(device)
    exact_model = copy.deepcopy(model).double()
    with recorded(model) as calls:
        eager = model(tokens).logits
    with routed_as(exact_model, calls):
        exact = exact_model(tokens).logits
    use_moe(model)
    with routed_as(model, calls):
        ours = model(tokens).logits
    assert relative_error(ours, exact) <= 1.2 * relative_error(eager, exact)
    assert len(our_calls) == 2, "by the layer's kernels"


@pytest.mark.parametrize("check", [use_moe, check_model])
@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        (
            {},
            torch.float32,
            r"mlp\.experts: expected weights .* in bfloat16, got torch\.float32; .*dtype=torch\.bfloat16",
        ),
        ({}, torch.float16, r"mlp\.experts: expected weights .* in bfloat16, got torch\.float16"),
        ({"intermediate_size": 50}, torch.bfloat16, r"sizes that are multiples of 8, got down_proj \[4, 64, 50\]"),
    ],
    ids=["fp32", "fp16", "sizes"],
)
def test_a_model_whose_weights_we_cannot_read_is_refused_before_its_first_call(settings, dtype, message, check) -> None:
    register()
    model = build_model("mixtral", **settings).to(dtype)
    if check is check_model:
        model.set_experts_implementation("moe")
    with pytest.raises(ValueError, match=message):
        check(model)
    assert model.config._experts_implementation == ("moe" if check is check_model else "eager")


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_batch_invariance_reaches_the_layers(is_batch_invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    tuned = operators.tuned_pipeline
    monkeypatch.setattr(
        operators, "tuned_pipeline", lambda config, device: configs.append(config) or tuned(config, device)
    )
    operators._pipeline.cache_clear()
    name = f"moe-{is_batch_invariant}"
    model = use_moe(build_model("mixtral"), name, is_batch_invariant=is_batch_invariant)
    check_model(model, name)
    with torch.no_grad():
        model(tokens_for(model.device))
    assert [config.few_tokens.max_tokens for config in configs] == [0 if is_batch_invariant else None]


def test_a_name_stands_for_layers_of_one_kind() -> None:
    register("moe-one-kind", is_batch_invariant=True)
    register("moe-one-kind", is_batch_invariant=True)
    with pytest.raises(ValueError, match="expected one that does not stand for layers with is_batch_invariant=True"):
        register("moe-one-kind")


def test_check_model_sees_another_implementation() -> None:
    model = use_moe(build_model("olmoe"))
    check_model(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"expected experts_implementation 'moe', got 'eager'; call use_moe"):
        check_model(model)


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_names_of_transformers_are_not_taken(name: str) -> None:
    before = transformers_moe.ALL_EXPERTS_FUNCTIONS.get(name)
    with pytest.raises(ValueError, match=f"got '{name}'; pass another"):
        register(name)
    assert transformers_moe.ALL_EXPERTS_FUNCTIONS.get(name) is before


def test_a_second_name_works_too(our_calls: list[Tensor]) -> None:
    model = use_moe(build_model("mixtral"), name="moe-again")
    check_model(model, name="moe-again")
    with torch.no_grad():
        model(tokens_for(model.device))
    assert len(our_calls) == 2


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations", None)
    with pytest.raises(ImportError, match=r"needs transformers; pip install .transformers>=5\.7"):
        register()


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.6.0.dev0")
    with pytest.raises(ImportError, match=r"expected transformers 5\.7 or newer, got 5\.6\.0\.dev0; pip install"):
        register()
