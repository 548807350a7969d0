"""From a checkpoint to the flat call, and the mistakes that a packing made elsewhere may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe.gemm.weight_format import convert_weights, pack_weights
from moe.packing.checkpoint import find_layer
from moe.testing.problems import make_problem

BLOCKS = moe.WeightFormat(layout="BlockMajorK", gate_up_order="up_gate")  # not shuffled
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
GROUPED: dict[str, Any] = {"method": "DeepSeekV3", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
CONFIGS = {
    "renormalize": moe.MoEConfig.create(**SIZES),
    "grouped": moe.MoEConfig.create(**SIZES, **GROUPED),
    "relu2": moe.MoEConfig.create(**SIZES, **GROUPED, activation="Relu2"),
    "slice": moe.MoEConfig.create(**SIZES, local_expert_offset=2, num_local_experts=3),
}


def weights_of(config: moe.MoEConfig) -> tuple[Tensor, Tensor]:
    """Of all experts, MajorK."""
    problem = make_problem(moe.MoEConfig.create(**SIZES, activation=config.gemm1.activation), 1)
    return problem.w1, problem.w2


def apart(w1: Tensor, w2: Tensor, prefix: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """As checkpoints have them: matrices of each expert by themselves."""
    gate, up, down = names
    state = {}
    for expert in range(len(w1)):
        at = f"{prefix}experts.{expert}."
        halves = w1[expert].chunk(2) if w1.shape[1] == 2 * w2.shape[2] else (None, w1[expert])
        if halves[0] is not None:
            state[f"{at}{gate}.weight"] = halves[0]
        state[f"{at}{up}.weight"], state[f"{at}{down}.weight"] = halves[1], w2[expert]
    return state


def run(flat: moe.FlatWeights, config: moe.MoEConfig) -> tuple[Tensor, Tensor]:
    """The flat call's result, and what the weights as they were give."""
    problem = make_problem(config, 9)
    bias = torch.linspace(-0.1, 0.1, 8) if config.routing.method.uses_bias else None
    w1, w2 = weights_of(config)
    local = slice(config.permute.local_expert_offset, None)
    local = slice(local.start, local.start + config.permute.num_local_experts)
    got = moe.trtllm_bf16_moe(problem.logits, bias, problem.hidden_states, **flat._asdict())
    wanted = moe.reference_pipeline(config)(problem.logits, problem.hidden_states, w1[local], w2[local], bias=bias)
    return got, wanted


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", ["pair", "fused", "gate_proj", "w1"])
def test_a_checkpoint_goes_into_the_flat_call(config: moe.MoEConfig, form: str) -> None:
    w1, w2 = weights_of(config)
    first = "gate_up_proj" if config.gemm1.is_gated else "up_proj"
    source: Any = {
        "pair": (w1, w2),
        "fused": {f"model.layers.3.mlp.experts.{first}": w1, "model.layers.3.mlp.experts.down_proj": w2},
        "gate_proj": apart(w1, w2, "model.layers.3.mlp.", ("gate_proj", "up_proj", "down_proj")),
        "w1": apart(w1, w2, "block_sparse_moe.", ("w1", "w3", "w2")),
    }[form]
    flat = moe.flat_weights(source, config)
    got, wanted = run(flat, config)
    assert torch.equal(got, wanted)
    assert len(flat.gemm1_weights) == config.permute.num_local_experts
    moe.check_packing(flat, source, config)


def test_a_slice_of_the_experts_may_be_named_or_be_all_that_there_is() -> None:
    config = CONFIGS["slice"]
    w1, w2 = weights_of(config)
    wanted = moe.flat_weights((w1, w2), config)
    whole = moe.MoEConfig.create(**SIZES)
    for source in ((w1, w2), (w1[2:5], w2[2:5])):
        flat = moe.flat_weights(source, whole, local_expert_offset=2, local_num_experts=3)
        assert (flat.local_expert_offset, flat.local_num_experts) == (2, 3)
        assert torch.equal(flat.gemm1_weights, wanted.gemm1_weights)
        assert torch.equal(flat.gemm2_weights, wanted.gemm2_weights)
    rest = moe.flat_weights((w1, w2), whole, local_expert_offset=6)
    assert rest.local_num_experts == 2


def test_a_layer_is_chosen_by_number_and_shared_experts_are_none() -> None:
    config = CONFIGS["renormalize"]
    state: dict[str, Tensor] = {}
    for layer in range(12):
        weights = tuple(weight * (1 + layer) for weight in weights_of(config))
        state |= apart(*weights, f"model.layers.{layer}.mlp.", ("gate_proj", "up_proj", "down_proj"))
        state[f"model.layers.{layer}.mlp.shared_experts.gate_proj.weight"] = torch.zeros(64, 128).bfloat16()
    moe.check_packing(
        moe.flat_weights(state, config, layer=1), tuple(2 * weight for weight in weights_of(config)), config
    )
    with pytest.raises(ValueError, match=r"expected the experts of one layer in the state dict, got 12 .* pass layer="):
        moe.flat_weights(state, config)
    with pytest.raises(ValueError, match="of which layer=12 names 0"):
        moe.flat_weights(state, config, layer=12)


def test_a_config_json_is_enough() -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "hidden_act": "silu",
    }  # fmt: skip
    flat = moe.flat_weights(weights_of(CONFIGS["renormalize"]), config)
    assert flat.routing_method_type == moe.RoutingMethodType.Renormalize
    moe.check_packing(flat, weights_of(CONFIGS["renormalize"]), config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((torch.zeros(8, 128, 64).bfloat16(), torch.zeros(8, 128, 64).bfloat16()), "w1: expected .*, got"),
        ((torch.zeros(8, 128, 128), torch.zeros(8, 128, 64)), "w1: expected bfloat16, got float32"),
        ({"lm_head.weight": torch.zeros(2, 2)}, r"got 0 \(none \.\.\)"),
        ({"experts.0.gate_proj.weight": torch.zeros(64, 128).bfloat16()}, r"expected experts\.0\.up_proj or experts\.0\.w3, found none"),
    ],
)  # fmt: skip
def test_what_is_no_layers_weights_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe.flat_weights(source, CONFIGS["renormalize"])


def test_what_the_flat_call_has_no_number_for_is_refused() -> None:
    config = moe.MoEConfig.create(**SIZES, method="TopKSigmoid")
    with pytest.raises(ValueError, match="expected one with a number in the flat call, got TopKSigmoid"):
        moe.flat_weights(weights_of(config), config)
    with pytest.raises(TypeError, match="source: expected a module, a state dict or"):
        moe.flat_weights(3, config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"has_biases": True}, "without biases, got has_biases"),
        ({"weight_on": "input"}, "weight_on 'output', got 'input'"),
    ],
    ids=["biases", "weight on input"],
)
def test_what_the_flat_call_has_no_argument_for_is_refused(change: dict[str, Any], words: str) -> None:
    config = moe.MoEConfig.create(**SIZES, **change)
    with pytest.raises(ValueError, match=f"config: expected .*{words}.*build_pipeline"):
        moe.flat_weights(weights_of(config), config)


@pytest.mark.parametrize(
    "bias",
    ["experts.gate_up_proj_bias", "experts.down_proj_bias", "experts.3.gate_proj.bias", "experts.0.w2.bias"],
)
def test_biases_of_a_state_dict_are_not_dropped(bias: str) -> None:
    w1, w2 = weights_of(CONFIGS["renormalize"])
    state = {"experts.gate_up_proj": w1, "experts.down_proj": w2}
    if ".0." in bias or ".3." in bias:
        state = apart(w1, w2, "", ("gate_proj", "up_proj", "down_proj"))
    with pytest.raises(ValueError, match=rf"expected experts without biases, got {bias};"):
        moe.flat_weights(state | {bias: torch.zeros(8)}, CONFIGS["renormalize"])
    router = {"router.bias": torch.zeros(8)}
    assert torch.equal(*run(moe.flat_weights(state | router, CONFIGS["renormalize"]), CONFIGS["renormalize"]))


def test_interleaved_rows_and_a_configs_numbers_go_into_the_flat_call() -> None:
    order = moe.WeightFormat(layout="MajorMn", gate_up_order="interleaved")
    numbers = moe.SwigluNumbers(alpha=1.702, beta=1.0, clamp_limit=0.7)
    config = moe.MoEConfig.create(**SIZES, weight_format=order, swiglu=numbers)
    problem = make_problem(config, 9)
    pair = pack_weights(problem.w1, order, is_gated=True), pack_weights(problem.w2, order, is_gated=False)
    tensors = (problem.logits, None, problem.hidden_states)
    got = moe.trtllm_bf16_moe(*tensors, **moe.flat_weights(pair, config)._asdict())
    wanted = moe.reference_pipeline(config)(problem.logits, problem.hidden_states, *pair)
    assert torch.equal(got, wanted)
    plain = moe.reference_pipeline(config)(problem.logits, problem.hidden_states, *pair, swiglu=moe.SwigluParams())
    assert not torch.equal(wanted, plain)


def test_an_experts_module_with_interleaved_rows_gives_them_in_order_and_biases_are_refused() -> None:
    pytest.importorskip("transformers", minversion="5.17")
    from integrations.test_hf_classes import CLASSES, build

    where = next((where for where in CLASSES if where.endswith(".GptOssExperts")), None)
    if where is None:
        pytest.skip("this transformers has no GptOssExperts")
    experts = build(where)
    config = moe.MoEConfig.create(hidden_size=64, intermediate_size=32, num_experts=5, top_k=2)
    with pytest.raises(ValueError, match=r"expected experts without biases, got some; .*build_pipeline"):
        moe.flat_weights(experts, config)
    experts.has_bias = False
    layer = find_layer(experts, config, None, None, None)
    assert layer.config.gemm1.weight_format.gate_up_order == "interleaved"


def test_an_experts_module_gives_its_weights_and_its_gate() -> None:
    transformers = pytest.importorskip("transformers")
    from moe.integrations.huggingface import run_hf_experts

    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    flat = moe.flat_weights(model, config, layer=1)
    moe.check_packing(flat, model.state_dict(), config, layer=1)
    moe.check_packing(flat, model.model.layers[1].mlp.experts, config)
    with pytest.raises(ValueError, match=r"packing: .*other experts"):
        moe.check_packing(flat, model.model.layers[0], config)
    with pytest.raises(ValueError, match=r"got 2 \(model\.layers\.0\.mlp\.experts \.\.\), of which layer=None names 0"):
        moe.flat_weights(model, config)

    hidden_states, block = torch.randn(5, 128).bfloat16(), model.model.layers[1].mlp
    with torch.no_grad():
        logits = (hidden_states @ block.gate.weight.T).float()
        topk = moe.reference_pipeline(moe.MoEConfig.from_hf_config(config)).route(logits)
        wanted = run_hf_experts(block.experts, hidden_states, topk.expert_ids, topk.weights)
        assert torch.equal(moe.trtllm_bf16_moe(logits, None, hidden_states, **flat._asdict()), wanted)


def packed(config: moe.MoEConfig, **formats: Any) -> dict[str, Any]:
    w1, w2 = weights_of(config)
    is_gated = formats.pop("is_gated", config.gemm1.is_gated)
    weight_format = moe.FLASHINFER.model_copy(update=formats)
    right = moe.flat_weights((w1, w2), config)._asdict()
    return right | {"gemm1_weights": pack_weights(w1, weight_format, is_gated=is_gated)}


def swapped_by_hand(w1: Tensor) -> Tensor:
    gate, up = w1.chunk(2, dim=1)
    return torch.cat((up, gate), dim=1)


def mistakes() -> dict[str, tuple[str, dict[str, Any], str]]:
    """By name: the layer, what is not right about the arguments, and the words that say so."""
    config = CONFIGS["renormalize"]
    w1, w2 = weights_of(config)
    plain = moe.WeightFormat(layout="BlockMajorK")
    other = moe.flat_weights((w1.flip(0), w2), config)
    return {
        "halves_swapped": ("renormalize", packed(config, gate_up_order="gate_up"), "gemm1_weights: halves swapped"),
        "not_shuffled": ("renormalize", packed(config, is_shuffled=False), "gemm1_weights: rows are not shuffled"),
        "not_shuffled_nor_swapped": (
            "renormalize", packed(config, is_shuffled=False, gate_up_order="gate_up"), "not shuffled.*; halves swapped",
        ),
        "shuffled_where_it_should_not_be": (
            "renormalize", packed(config) | {"use_shuffled_weight": False}, "rows are shuffled, use_shuffled_weight=False",
        ),
        "not_gated": (
            "renormalize",
            packed(config) | {"gemm1_weights": pack_weights(swapped_by_hand(w1), moe.FLASHINFER, is_gated=False)},
            "gemm1_weights: shuffled as without a gate",
        ),
        "w2_not_shuffled": (
            "renormalize", packed(config) | {"gemm2_weights": pack_weights(w2, plain, is_gated=False)},
            "gemm2_weights: rows are not shuffled",
        ),
        "reshaped": (
            "renormalize",
            packed(config) | {"gemm1_weights": convert_weights(w1, moe.WeightFormat(), moe.WeightFormat(is_shuffled=True, gate_up_order="up_gate"), is_gated=True).reshape(8, 2, 128, 64)},
            "gemm1_weights: not cut into blocks of 64 columns",
        ),
        "other_experts": ("renormalize", other._asdict(), "gemm1_weights: its first expert is none"),
        "method": ("renormalize", packed(config) | {"routing_method_type": 0}, r"routing_method_type: expected 1 \(Renormalize\), got 0 \(Default\)"),
        "no_method": (
            "grouped",
            {name: value for name, value in packed(CONFIGS["grouped"]).items() if name != "routing_method_type"} | {"n_group": None, "topk_group": None},
            r"n_group: expected 4, got None; .*routing_method_type: expected 2 \(DeepSeekV3\), got 0 \(Default\)",
        ),
        "scale": ("grouped", packed(CONFIGS["grouped"]) | {"routed_scaling_factor": None}, "routed_scaling_factor: expected 2.5, got 1.0"),
        "activation": ("relu2", packed(CONFIGS["relu2"]) | {"activation_type": 3}, "the flat call refuses it: .*activation_type: expected 6, got 3"),
        "offset": ("slice", packed_slice() | {"local_expert_offset": 0}, "local_expert_offset: expected 2, got 0"),
    }  # fmt: skip


def packed_slice() -> dict[str, Any]:
    return moe.flat_weights(weights_of(CONFIGS["slice"]), CONFIGS["slice"])._asdict()


@pytest.mark.parametrize("name", mistakes())
def test_check_packing_says_which_mistake_was_made(name: str) -> None:
    layer, arguments, words = mistakes()[name]
    config = CONFIGS[layer]
    with pytest.raises(ValueError, match=f"^packing: .*{words}") as refusal:
        moe.check_packing(arguments, weights_of(config), config)
    if name in ("halves_swapped", "method", "scale"):
        assert str(refusal.value).count("expected") == 2, "one error, one mistake"
