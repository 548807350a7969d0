"""Models that are wrapped, adapted, sharded, autocast, quantised, traced, or parts of others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.test_huggingface import build_model, make_experts, routed_tokens, tokens_for
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.integrations.huggingface import check_model, register, use_moe
from moe.testing.closeness import relative_error

pytest.importorskip("transformers", minversion="5.7")
from transformers import AutoModelForCausalLM


class ValueHead(nn.Module):
    """A model and a head beside it, as reinforcement learning has it: no transformers model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(64, 1, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Any:
        return self.pretrained_model(tokens)


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens_for(torch.device("cpu"))).logits


@pytest.mark.parametrize(
    "wrap", [ValueHead, torch.compile, nn.DataParallel, nn.Sequential], ids=lambda wrap: wrap.__name__
)
def test_a_wrapped_model_is_handed_over_whole(wrap: Any) -> None:
    expected = logits_of(use_moe(build_model("mixtral")))
    model = build_model("mixtral")
    wrapped = wrap(model)
    assert use_moe(wrapped) is wrapped
    check_model(wrapped)
    check_model(model)
    assert torch.equal(logits_of(model), expected)


def test_a_model_under_ddp_is_handed_over(one_process: None) -> None:
    expected = logits_of(use_moe(build_model("mixtral")))
    wrapped = use_moe(nn.parallel.DistributedDataParallel(build_model("mixtral")))
    assert torch.equal(logits_of(wrapped), expected)


def test_one_decoder_layer_is_handed_over_and_the_others_are_left() -> None:
    model = build_model("mixtral")
    first, second = model.model.layers
    use_moe(first)
    check_model(first)
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match=r"expected experts_implementation 'moe', got 'eager'"):
        check_model(second)
    both = copy.deepcopy(model)
    assert relative_error(logits_of(model), logits_of(use_moe(both))) <= 2e-2


def test_one_experts_module_is_handed_over() -> None:
    model = build_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    use_moe(experts)
    check_model(experts)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "eager"
    inputs = torch.randn(5, 64).bfloat16(), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        assert experts(*inputs).isfinite().all()


def test_adapted_experts_are_read_as_they_are_in_a_call() -> None:
    class Added(nn.Module):
        def __init__(self, shape: torch.Size) -> None:
            super().__init__()
            self.delta = nn.Parameter(torch.randn(shape).bfloat16() * 0.1)

        def forward(self, weights: Tensor) -> Tensor:
            return weights + self.delta

    experts = make_experts()
    inputs = routed_tokens(experts, 9)
    plain = experts(*inputs)
    merged = make_experts()
    parametrize.register_parametrization(experts, "gate_up_proj", Added(experts.gate_up_proj.shape))
    with torch.no_grad():
        merged.gate_up_proj.copy_(experts.gate_up_proj)
        use_moe(experts)
        adapted = experts(*inputs)
    assert not torch.equal(adapted, plain)
    assert torch.equal(adapted, merged(*inputs))


MIXED = {"with_mixed_precision": torch.float32, "without": torch.bfloat16}


@pytest.mark.parametrize("dtype", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("shards", ["model", "layers", "experts"])
def test_a_model_sharded_by_fully_shard_runs_on_us(dtype: torch.dtype, shards: str, one_process: None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    expected = logits_of(use_moe(build_model("mixtral")))
    model = build_model("mixtral").to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if dtype is torch.float32 else MixedPrecisionPolicy()
    for layer in model.model.layers:
        if shards == "layers":
            fully_shard(layer, mp_policy=policy)
        elif shards == "experts":
            fully_shard(layer.mlp.experts, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    use_moe(model)
    check_model(model)
    assert relative_error(logits_of(model), expected) <= 1e-2
    check_model(model)


def test_a_model_that_is_sharded_after_it_was_handed_over_runs_on_us(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = use_moe(build_model("mixtral"))
    expected = logits_of(model)
    fully_shard(model)
    check_model(model)
    assert torch.equal(logits_of(model), expected)


def test_a_float32_model_is_to_be_sharded_first(one_process: None) -> None:
    with pytest.raises(
        ValueError, match=r"got torch\.float32; .* fully_shard with mp_policy=MixedPrecisionPolicy\(param_dtype"
    ):
        use_moe(build_model("mixtral").float())


def test_weights_that_fully_shard_gathers_in_float32_are_refused(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = build_model("mixtral").float()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"fully_shard gathers in bfloat16, got torch\.float32; pass mp_policy="):
        use_moe(model)


def test_weights_that_a_wrapper_flattened_are_refused() -> None:
    model = build_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.flatten())
    with pytest.raises(
        ValueError, match=r"expected down_proj \[E, rows, columns\], got \[.*before the model is wrapped"
    ):
        use_moe(model)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_experts_run_in_bfloat16_and_return_what_came(dtype, weights_dtype, device) -> None:
    experts = make_experts(device)
    hidden_states, ids, weights = routed_tokens(experts, 9)
    expected = experts(hidden_states, ids, weights)
    experts.to(weights_dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = experts(hidden_states.to(dtype), ids, weights)
        check_model(experts)
    assert output.dtype is dtype
    assert torch.equal(output, expected.to(dtype))


def test_a_model_whose_norm_gives_float32_runs_under_autocast() -> None:
    model = build_model("phimoe", num_local_experts=4, intermediate_size=48)
    use_moe(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logits_of(model)
        model.set_experts_implementation("eager")
        eager = logits_of(model)
    assert relative_error(ours, eager) <= 2e-2


def test_autocast_to_float16_is_no_help() -> None:
    experts = make_experts()
    hidden_states, ids, weights = routed_tokens(experts, 3)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match=r"hidden_states in bfloat16, got torch\.float32"),
    ):
        experts(hidden_states.float(), ids, weights)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32], ids=str)
def test_quantised_weights_are_named_as_such(dtype: torch.dtype) -> None:
    experts = make_experts()
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(dtype), requires_grad=False)
    for refused in (lambda: use_moe(experts), lambda: experts(*routed_tokens(make_experts(), 3))):
        with pytest.raises(
            ValueError, match=rf"down_proj in bfloat16, got {dtype} .*quantised; dequantise .* scales"
        ) as error:
            refused()
        assert ".to(" not in str(error.value)


def test_quantised_experts_classes_are_named_as_such() -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = build_model("mixtral")
    config = copy.copy(model.config)
    config.swiglu_limit = 7.0
    for experts in (finegrained.FP8Experts(config, block_size=(32, 32)), mxfp4.Mxfp4GptOssExperts(config)):
        model.model.layers[0].mlp.experts = experts
        with pytest.raises(
            ValueError, match=rf"got .*{type(experts).__name__}.* quantised; dequantise the weights with"
        ):
            use_moe(model)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "transposed"])
def test_fake_and_meta_tensors_give_the_result_s_shape(is_transposed: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    experts = make_experts(is_transposed=is_transposed)
    inputs = routed_tokens(experts, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = experts(*(mode.from_tensor(tensor) for tensor in inputs))
    assert (fake.shape, fake.dtype, fake.device.type) == ((7, 32), torch.bfloat16, "cpu")
    meta = experts.to("meta")(*(tensor.to("meta") for tensor in inputs))
    assert (meta.shape, meta.dtype, meta.device.type) == ((7, 32), torch.bfloat16, "meta")


def test_a_model_of_fake_tensors_runs_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = build_model("mixtral").config
    with FakeTensorMode():
        model = use_moe(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        assert logits_of(model).shape == (3, 11, 96)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_experts_give_the_bits_of_eager_ones(strict: bool) -> None:
    experts = make_experts()
    inputs = routed_tokens(experts, 7)
    with torch.no_grad():
        program = torch.export.export(experts, inputs, strict=strict)
        assert "moe.run_experts" in program.graph_module.code
        assert torch.equal(program.module()(*inputs), experts(*inputs))


def test_exported_experts_take_any_number_of_tokens() -> None:
    experts = make_experts()
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens})
    with torch.no_grad():
        program = torch.export.export(experts, routed_tokens(experts, 7), dynamic_shapes=shapes, strict=False)
        for num_tokens in (1, 19):
            inputs = routed_tokens(experts, num_tokens)
            assert torch.equal(program.module()(*inputs), experts(*inputs))


def test_the_operator_is_what_torch_asks_of_one() -> None:
    experts = make_experts()
    hidden_states, ids, weights = routed_tokens(experts, 7)
    register()
    arguments = (
        hidden_states,
        ids,
        weights,
        experts.gate_up_proj.data,
        experts.down_proj.data,
        3,
        0,
        False,
        1.7,
        1.0,
        7.0,
    )
    torch.library.opcheck(torch.ops.moe.run_experts.default, arguments)


def longcat() -> nn.Module:
    settings = {"n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 3}
    sizes = {
        "expert_ffn_hidden_size": 48,
        "ffn_hidden_size": 64,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
    }
    return build_model("longcat_flash", **settings, **sizes, qk_rope_head_dim=8, v_head_dim=16, head_dim=8)


def jetmoe() -> nn.Module:
    return build_model("jetmoe", num_local_experts=6, num_experts_per_tok=2, intermediate_size=48, kv_channels=16)


def llama4() -> nn.Module:
    return build_model("llama4_text", num_local_experts=4, intermediate_size=48, intermediate_size_mlp=48, head_dim=16)


def llama4_of_two_choices() -> nn.Module:
    sizes = {"intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 16}
    return build_model("llama4_text", num_local_experts=4, num_experts_per_tok=2, **sizes)


OWN = ("LongcatFlashExperts", "JetMoeMoE", "Llama4TextMoe")


@pytest.mark.parametrize("build", [longcat, jetmoe, llama4, llama4_of_two_choices], ids=lambda build: build.__name__)
def test_models_that_hand_nothing_over_run_by_a_forward_of_ours(build: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match="expected a forward of 'moe', got its class's; call use_moe"):
        check_model(model)
    modules = [module for module in model.modules() if type(module).__name__ in OWN]
    calls: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda module, args, output: calls.append((module, args, output))) for m in modules
    ]
    logits_of(model)
    assert use_moe(model) is model
    check_model(model)
    assert calls
    for module, args, eager in calls.copy():
        exact = copy.deepcopy(module)
        del exact.forward
        with torch.no_grad():
            exact = first_of(exact.double()(*(arg.double() if arg.is_floating_point() else arg for arg in args)))
            ours = module(*args)
        assert type(ours) is type(eager)
        ours, eager = first_of(ours), first_of(eager)
        assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
        assert relative_error(ours, exact) <= max(1.2 * relative_error(eager, exact), 5e-3)
    for hook in hooks:
        hook.remove()
    copied = copy.deepcopy(model)
    check_model(copied)
    assert torch.equal(logits_of(copied), logits_of(model))
    with pytest.raises(ValueError, match="expected a forward of 'moe-other'"):
        check_model(model, "moe-other")


@pytest.mark.parametrize("build", [longcat, jetmoe, llama4], ids=lambda build: build.__name__)
def test_those_models_run_sharded_too(build: Any, one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = logits_of(use_moe(build()))
    model = build()
    fully_shard(model)
    assert torch.equal(logits_of(use_moe(model)), expected)


def first_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def test_longcats_experts_that_return_their_input_are_reached() -> None:
    experts = next(module for module in longcat().modules() if type(module).__name__ == "LongcatFlashExperts")
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, 64, generator=generator).bfloat16()
    weights = torch.rand(4, 2, generator=generator)
    ids = torch.tensor([[6, 8], [0, 7], [5, 1], [8, 8]])
    with torch.no_grad():
        exact = copy.deepcopy(experts).double()(hidden_states.double(), ids, weights.double())
        use_moe(experts)
        ours = experts(hidden_states, ids, weights)
    assert relative_error(ours, exact) <= 6e-3
    torch.testing.assert_close(ours[3], (weights[3].sum() * hidden_states[3].float()).bfloat16())


def test_another_activation_is_refused_there_too() -> None:
    model = jetmoe()
    model.model.layers[0].mlp.activation = nn.Mish()
    with pytest.raises(ValueError, match=r"mlp\.activation: expected silu or gelu, got Mish"):
        use_moe(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
