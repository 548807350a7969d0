"""Biases of both GEMMs through the whole layer: every entry against float64, stages that do not know them, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gemm.cases import format_id
from small_layer import SMALL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import moe
from moe import MoEConfig, MoEPipeline, SwigluParams, TopK, WeightFormat, build_pipeline, reference_pipeline
from moe.call import LayerCall
from moe.failing_calls import _call_of, tensors_by_name
from moe.gemm.config import FLASHINFER
from moe.gemm.weight_format import pack_bias, pack_weights
from moe.stages import FusedExperts
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, make_problem
from moe.traced import run_traced
from moe.tuning.tuned import TunedPipeline, tuned_pipeline

GPT_OSS = WeightFormat(layout="MajorMn", gate_up_order="interleaved")
FORMATS = [WeightFormat(), FLASHINFER, GPT_OSS, WeightFormat(gate_up_order="interleaved")]


def layer(
    weight_format: WeightFormat = WeightFormat(),
    num_tokens: int = 7,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    **changes: object,
) -> tuple[MoEConfig, tuple[Any, ...], dict[str, Any], Callable[[Tensor], Tensor]]:
    """A layer like gpt-oss: its config, a call's tensors, what else the call takes, and the truth by its logits."""
    config = MoEConfig.create(**SMALL | changes, weight_format=weight_format)
    problem = make_problem(config, num_tokens, device=device)
    generator = torch.Generator(device=device).manual_seed(1)
    gemms, weights = (config.gemm1, config.gemm2), (problem.w1, problem.w2)
    biases = [torch.randn(w.shape[:2], generator=generator, device=device).to(dtype) for w in weights]
    packed = [pack_weights(w, weight_format, is_gated=gemm.is_gated) for w, gemm in zip(weights, gemms)]
    stored = [pack_bias(b, weight_format, is_gated=gemm.is_gated) for b, gemm in zip(biases, gemms)]
    count = config.gemm1.num_experts
    swiglu = None
    if config.gemm1.is_gated:
        swiglu = SwigluParams(*(torch.full((count,), value, device=device) for value in (1.702, 1.0, 7.0)))
    more = {"swiglu": swiglu, "w1_bias": stored[0], "w2_bias": stored[1]}

    def exact(logits: Tensor) -> Tensor:
        return experts_in_float64(
            reference_pipeline(config).route(logits),
            problem.hidden_states,
            *weights,
            activation=config.gemm1.activation,
            local_expert_offset=config.permute.local_expert_offset,
            swiglu=swiglu,
            w1_bias=biases[0],
            w2_bias=biases[1],
        )

    return config, (problem.logits, problem.hidden_states, *packed), more, exact


def all_entries(pipeline: MoEPipeline | TunedPipeline, tensors: tuple[Any, ...], more: dict[str, Any]) -> list[Tensor]:
    """The layer's result by each of the four entries."""
    topk = reference_pipeline(pipeline.config).route(tensors[0])
    results = [pipeline(*tensors, **more), pipeline.run_experts(topk, *tensors[1:], **more)]
    for outputs in (
        pipeline.expert_outputs(*tensors, **more),
        pipeline.run_experts_unfinalized(topk, *tensors[1:], **more),
    ):
        rows = outputs.rows[outputs.row_of_slot.clamp(min=0).long()].float()
        is_local = (outputs.row_of_slot >= 0)[..., None]
        results.append(torch.where(is_local, outputs.weights[..., None].float() * rows, 0.0).sum(1).bfloat16())
    return results


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_entry_adds_both(poisoned_memory, device, weight_format, num_tokens, dtype):
    config, tensors, more, exact = layer(weight_format, num_tokens, device, dtype)
    reference = reference_pipeline(config)(*tensors, **more)
    for pipeline in (build_pipeline(config, device), tuned_pipeline(config, device)):
        for result in all_entries(pipeline, tensors, more):
            assert_close_to_exact(result, reference, exact(tensors[0]))


@pytest.mark.parametrize("name", ["w1_bias", "w2_bias"])
@pytest.mark.parametrize("activation", ["Relu2", "Gelu", "Swiglu"])
def test_one_of_them_is_enough(poisoned_memory, device, activation, name):
    config, tensors, more, _ = layer(activation=activation, device=device)
    one = {name: more[name], "swiglu": more["swiglu"]}
    zeros = one | {other: torch.zeros_like(more[other]) for other in ("w1_bias", "w2_bias") if other != name}
    pipeline = build_pipeline(config, device)
    assert torch.equal(pipeline(*tensors, **one), pipeline(*tensors, **zeros))
    assert not torch.equal(pipeline(*tensors, **one), pipeline(*tensors, swiglu=more["swiglu"]))


def test_a_slice_takes_the_biases_of_its_own_experts(poisoned_memory, device):
    config, tensors, more, exact = layer(GPT_OSS, device=device, num_local_experts=3, local_expert_offset=4)
    assert more["w1_bias"].shape[0] == 3
    reference = reference_pipeline(config)(*tensors, **more)
    assert_close_to_exact(build_pipeline(config, device)(*tensors, **more), reference, exact(tensors[0]))


def test_many_tokens_of_a_layer_for_wide_kernels(cuda, poisoned_memory):
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 8, "top_k": 4}
    for num_tokens in (1, 64, 300, 2000):
        for weight_format in FORMATS:
            config, tensors, more, exact = layer(weight_format, num_tokens, cuda, **sizes)
            reference = reference_pipeline(config)(*tensors, **more)
            assert_close_to_exact(build_pipeline(config, cuda)(*tensors, **more), reference, exact(tensors[0]))


def without_bias(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mine(first: Tensor, weights: Tensor, permutation: Any, *, swiglu: Any = None) -> Tensor:
        more = {} if swiglu is None else {"swiglu": swiglu}
        return stage(first, weights, permutation, **more)

    return mine


@pytest.mark.parametrize("checks_inputs", [True, False])
@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_a_swapped_stage_that_takes_none_is_given_none_and_named_where_there_is_one(stage, checks_inputs):
    config, tensors, more, _ = layer()
    plain = reference_pipeline(config)
    ran = []
    mine = replace(
        plain,
        **{stage: without_bias(getattr(plain, stage))},
        route=lambda *args, **keywords: ran.append(1) or plain.route(*args, **keywords),
        checks_inputs=checks_inputs,
    )
    other = "w2_bias" if stage == "gemm1" else "w1_bias"
    given = {"swiglu": more["swiglu"], other: more[other]}
    assert torch.equal(mine(*tensors, **given), plain(*tensors, **given))
    ran.clear()
    with pytest.raises(
        ValueError, match=rf"{stage}_bias: expected None, .* takes none, .*without_bias.*keyword `bias`"
    ):
        mine(*tensors, **more)
    assert not ran, "nothing runs"


def test_a_fused_callable_that_takes_none_steps_aside():
    config, tensors, more, _ = layer()
    plain = reference_pipeline(config)
    calls = []

    def sevens(topk: TopK, hidden_states: Tensor, *_: Any, swiglu: Any, output: Any) -> Tensor:
        calls.append(1)
        return torch.full_like(hidden_states, 7)

    chain = (plain.permute, plain.gemm1, plain.gemm2, plain.finalize)
    mine = replace(plain, fused=FusedExperts(sevens, 16, chain))
    assert torch.equal(mine(*tensors, **more), plain(*tensors, **more))
    assert not calls
    assert (mine(*tensors) == 7).all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("w1_bias", lambda b: b[:, :64], r"gemm1_bias: expected \[E_local=8, 2I=128\], got \[8, 64\]"),
        ("w2_bias", lambda b: b[:4], r"gemm2_bias: expected \[E_local=8, H=128\], got \[4, 128\]"),
        ("w2_bias", lambda b: b.half(), "gemm2_bias: expected bfloat16 or float32, got float16"),
        (
            "w1_bias",
            lambda b: b.to(torch.float8_e4m3fn),
            "gemm1_bias: expected .* got float8_e4m3fn, whose numbers are",
        ),
        ("w1_bias", lambda b: b.float().requires_grad_(), "gemm1_bias: expected a tensor that needs no gradient"),
        ("w1_bias", lambda b: b.T.contiguous().T, "gemm1_bias: expected a contiguous tensor"),
        ("w2_bias", lambda b: b.to("meta"), "gemm2_bias: expected a tensor on cpu, got one on meta"),
    ],
    ids=["columns", "experts", "dtype", "quantised", "gradient", "strides", "device"],
)
def test_what_is_no_bias_is_named_before_anything_runs(name, change, words):
    config, tensors, more, _ = layer()
    with pytest.raises(ValueError, match=words):
        reference_pipeline(config)(*tensors, **more | {name: change(more[name])})


def test_a_bias_that_is_no_tensor_is_a_type_error():
    config, tensors, more, _ = layer()
    with pytest.raises(TypeError, match=r"gemm1_bias: expected a torch\.Tensor, got float"):
        reference_pipeline(config)(*tensors, **more | {"w1_bias": 0.5})


def test_an_output_that_shares_memory_with_a_bias_is_refused():
    config, tensors, more, _ = layer()
    output = more["w2_bias"].view(-1)[: 7 * 128].view(7, 128)
    with pytest.raises(ValueError, match=r"output: expected memory of its own, .* shares memory with gemm2_bias"):
        reference_pipeline(config)(*tensors, **more, output=output)


def call_of(tensors: tuple[Any, ...], more: dict[str, Any]) -> LayerCall:
    return LayerCall(*tensors, more["swiglu"], w1_bias=more["w1_bias"], w2_bias=more["w2_bias"])


def test_a_kept_call_has_its_biases():
    _, tensors, more, _ = layer()
    call = call_of(tensors, more)
    kept = _call_of({name: tensor for name, tensor in tensors_by_name(call).items() if tensor is not None})
    assert torch.equal(kept.w1_bias, more["w1_bias"])
    assert torch.equal(kept.w2_bias, more["w2_bias"])


def test_traced_layers_take_them():
    config, tensors, more, _ = layer(GPT_OSS)
    pipeline = tuned_pipeline(config, "cpu")
    assert torch.equal(run_traced(pipeline.recipe, call_of(tensors, more)), pipeline(*tensors, **more))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        bias = mode.from_tensor(more["w1_bias"])
        assert pipeline(*fake, w1_bias=bias).shape == (7, 128)
        with pytest.raises(ValueError, match=r"gemm1_bias: expected \[8, 128\], got \[2, 128\]"):
            pipeline(*fake, w1_bias=bias[:2])


def test_a_layer_over_ranks_takes_those_of_its_experts():
    config, tensors, more, _ = layer(GPT_OSS)
    over_one = moe.parallel.build_layer(config, None, "cpu", exchange="local")
    assert torch.equal(over_one(*tensors, **more), reference_pipeline(config)(*tensors, **more))
