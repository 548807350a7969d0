"""Each family's rule against the router that transformers has for it."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.hf_config import FAMILIES, REFUSED
from moe.routing.reference import select_experts_reference
from moe.testing.closeness import BF16_EPSILON

transformers = pytest.importorskip("transformers", minversion="5.17")

E_OF = {"n_routed_experts": 16, "num_experts": 16, "num_local_experts": 16, "moe_num_experts": 16}
K_OF = {"num_experts_per_tok": 4, "num_experts_per_token": 4, "moe_topk": 4}
GROUPED = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.7}
ROUTER_CLASS = r"(TopK|Topk|TokenChoice)Router$"


@dataclass(frozen=True)
class Router:
    """Which of transformers' classes routes a family's tokens, and how its config is made."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    of: str = ""  # the family whose modeling file has the router; its own
    name: str = ROUTER_CLASS  # of the class
    block_scale: str = ""  # the key of a scale that the block around the router multiplies by


GROUPED_FAMILIES = [
    name for name, family in FAMILIES.items() if family.routing is FAMILIES["deepseek_v3"].routing and name != "kimi_k2"
]
UNSCALED = {"topk_method": "greedy", "routed_scaling_factor": 1.0}
ROUTERS = {
    **{name: Router(name, GROUPED) for name in GROUPED_FAMILIES},
    "axk2": Router("axk2", GROUPED | {"n_group": None, "topk_group": None}),
    "beam": Router("beam", GROUPED, block_scale="routed_scaling_factor"),
    "dots3_note": Router("dots3_note_text", GROUPED, name="TextTopkRouter$"),
    "glm4v_moe": Router("glm4v_moe_text", GROUPED),
    "kimi_k25": Router("deepseek_v3", GROUPED),  # a name for the text model
    "sarvam_mla": Router("sarvam_mla", GROUPED, of="deepseek_v3"),
    "sarvam_moe": Router("sarvam_moe", GROUPED, of="glm4_moe"),
    "deepseek_v3-ungrouped": Router("deepseek_v3", GROUPED | {"n_group": 1, "topk_group": 1}),
    **{
        f"{name}-{'renorm' if norm else 'raw'}": Router(name, {"norm_topk_prob": norm})
        for name in ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "mellum", "flint", "lara_mini")
        for norm in (True, False)
    },
    **{
        f"{name}-{'renorm' if norm else 'raw'}": Router(f"{name}_text", {"norm_topk_prob": norm}, name=router_class)
        for name, router_class in (
            ("qwen4_exp", ROUTER_CLASS),
            ("qwen3_omni_moe", "ThinkerTextTopKRouter$"),
            ("qwen3_omni_moe_talker", "TalkerTextTopKRouter$"),
        )
        for norm in (True, False)
    },
    **{
        name: Router(name)
        for name in (
            "mixtral",
            "minimax",
            "minimax_m2",
            "granitemoe",
            "granitemoeshared",
            "granitemoe_swa",
            "jamba",
        )
    },
    "granitemoehybrid": Router("granitemoehybrid", {"mamba_n_heads": 4}),
    "hunyuan_v1_moe": Router("hunyuan_v1_moe", name="Gate$"),
    "jetmoe": Router("jetmoe", name="TopKGating$"),
    "aria": Router("aria_text"),
    "qwen3_vl_moe": Router("qwen3_vl_moe_text"),
    "qwen3_5_moe": Router("qwen3_5_moe_text"),
    "deepseek_v2": Router("deepseek_v2", UNSCALED),
    "deepseek_ocr2": Router("deepseek_ocr2_text", UNSCALED),
    "unlimited_ocr": Router("unlimited_ocr_text", UNSCALED | {"num_attention_heads": 4}),
    **{
        f"mistral4-{'renorm' if norm else 'raw'}": Router(
            "mistral4", {"norm_topk_prob": norm, "routed_scaling_factor": 1.0}
        )
        for norm in (True, False)
    },
    "mistral_large4": Router("mistral_large4_text", {"routed_scaling_factor": 1.0}),
    "hy_v3": Router("hy_v3", {"router_scaling_factor": 1.7}),
    "afmoe": Router("afmoe", {"route_scale": 1.7}),
    "laguna": Router("laguna", {"moe_routed_scaling_factor": 1.7}, block_scale="moe_routed_scaling_factor"),
    "step3p5": Router(
        "step3p5", {"moe_router_scaling_factor": 1.7}, of="step3p7", block_scale="moe_router_scaling_factor"
    ),
    "glm5_next": Router("glm5_next_text", GROUPED),
    "hy_v4": Router("hy_v4", GROUPED),
    "hy_v4_vl": Router("hy_v4_vl_text", GROUPED),
    "minimax_m3_vl": Router("minimax_m3_vl_text", {"routed_scaling_factor": 1.7}, block_scale="routed_scaling_factor"),
    "gpt_oss": Router("gpt_oss"),
    "inkling2": Router("inkling2_text", {"route_scale": 1.7}),
    "inkling2_loop": Router("inkling2_loop_text", {"route_scale": 1.7}),
    "llama4-of_one": Router("llama4_text", {"num_experts_per_tok": 1}, name="Llama4Router$"),
    "llama4-of_four": Router("llama4_text", name="Llama4Router$"),
    "cohere2_moe-softmax": Router("cohere2_moe", {"expert_selection_fn": "softmax"}),
    "cohere2_moe-sigmoid-renorm": Router("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    "cohere2_moe-sigmoid-raw": Router("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
}
OF_THE_SAME_TEXT_MODEL = {
    "kimi_k2": "deepseek_v3",  # remote code
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "step3p7": "step3p5",
}


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_the_rule_is_the_one_of_transformers_router(router: Router) -> None:
    config = small_config(router.model_type, router.settings)
    gate = build_router(router, config)
    layer = MoEConfig.from_hf_config(config.to_dict())
    hidden_states = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(16, generator=torch.Generator().manual_seed(2)).bfloat16().float() * 0.25
    logits, weights, ids = run_router(gate, hidden_states, bias)
    if ids.shape != (50, layer.top_k):
        pytest.skip("the router of this transformers returns its choice in another form")
    if router.block_scale:
        weights = weights * getattr(config, router.block_scale)
    topk = select_experts_reference(logits, bias if layer.routing.method.uses_bias else None, config=layer.routing)
    ids, order = ids.sort(dim=1)
    our_ids, our_order = topk.expert_ids.sort(dim=1)
    assert torch.equal(our_ids, ids.to(torch.int32))
    error = (topk.weights.gather(1, our_order).double() - weights.gather(1, order).double()).abs()
    assert (error <= BF16_EPSILON * weights.gather(1, order).double().abs()).all()


def test_the_routers_above_cover_every_family() -> None:
    assert {name.split("-")[0] for name in ROUTERS} | OF_THE_SAME_TEXT_MODEL.keys() == FAMILIES.keys()


@torch.no_grad()
def test_axk2_with_groups_chooses_masked_experts_and_is_refused() -> None:
    config = small_config("axk2", GROUPED)
    gate = build_router(Router("axk2"), config)
    bias = torch.full((16,), -2.0)
    bias[8:] = -3.0  # so that the two best groups hold experts 0 to 7, whose keys are below 0
    _, _, ids = run_router(gate, torch.randn(1, 50, 32), bias)
    assert (ids >= 8).any()
    with pytest.raises(ValueError, match="expected n_group 1, got 4: it gives experts of other groups the key 0"):
        MoEConfig.from_hf_config(config)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["flint-renorm", "laguna", "minimax_m2", "minimax_m3_vl", "step3p5", "cohere2_moe-sigmoid-renorm"]
)
def test_where_all_sigmoids_underflow_these_routers_divide_0_by_0_and_ours_gives_0(name: str) -> None:
    config = small_config(ROUTERS[name].model_type, ROUTERS[name].settings)
    gate = build_router(ROUTERS[name], config)
    gate.weight.fill_(-200.0 / 32)
    logits, weights, _ = run_router(gate, torch.ones(1, 3, 32), torch.zeros(16))
    assert weights.isnan().all()
    layer = MoEConfig.from_hf_config(config.to_dict())
    assert (select_experts_reference(logits.float(), config=layer.routing).weights == 0).all()


def text_types_with_experts() -> list[str]:
    """The types of the text models of this transformers whose configs number experts."""
    found = set()
    for model_type in transformers.CONFIG_MAPPING:
        try:
            config = transformers.CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # a config that needs arguments: none of a model with experts
            continue
        for part in ("thinker_config", "text_config"):
            config = config.get(part) or config
        if any(re.search(r"(^|_)num_(local_)?experts$|n_routed_experts$", str(key)) for key in config):
            found.add(config.get("model_type") or model_type)
    return sorted(found - {"dots3_note_vision_encoder", "vitpose"})  # of images, and of a backbone's config


def test_every_model_type_with_experts_is_known_or_refused_with_a_reason() -> None:
    # One test, as to ask all configs takes seconds, which each mode of the tests would wait for if they were its ids.
    model_types = text_types_with_experts()
    assert len(model_types) > 30
    families = {model_type: model_type.removesuffix("_text") for model_type in model_types}
    assert [name for name, family in families.items() if (family in FAMILIES) == (family in REFUSED)] == []


def small_config(model_type: str, settings: dict[str, Any]) -> Any:
    """E=16, K=4, H=32, whatever the family calls them."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict().keys() | getattr(config_class, "attribute_map", {}).keys()
    wanted = {"hidden_size": 32, "moe_intermediate_size": 24, "intermediate_size": 24} | E_OF | K_OF
    return config_class(**{key: value for key, value in wanted.items() if key in known} | settings)


def build_router(router: Router, config: Any) -> torch.nn.Module:
    family = router.of or re.sub("(_talker)?(_text)?$", "", router.model_type)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    names = [name for name in vars(modeling) if re.search(router.name, name)]
    if not names:
        pytest.skip(f"this transformers has no router class for {family}")
    router_class = getattr(modeling, names[0])
    gate = router_class(32, 16, 4) if router.name == "TopKGating$" else router_class(config)
    gate = gate.float()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in gate.named_parameters():
        if name != "e_score_correction_bias":
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return gate


def run_router(gate: torch.nn.Module, hidden_states: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, ids), with the correction bias held by the router or handed to it."""
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.copy_(bias)
    takes_bias = gate.forward.__code__.co_argcount > 2
    flat = hidden_states if "TokenChoice" in type(gate).__name__ else hidden_states.view(-1, hidden_states.shape[-1])
    chosen = gate(flat, bias) if takes_bias else gate(flat)
    if type(gate).__name__ == "Llama4Router":  # scores of all experts, 0 of those that are not chosen
        scores, logits = chosen
        weights, ids = scores.topk(gate.top_k, dim=1)
        return logits, weights, ids
    return chosen if len(chosen) == 3 else by_slot(*chosen)


def by_slot(slots: Tensor, _tokens: Tensor, weights: Tensor, loads: list[int], logits: Tensor) -> tuple[Tensor, ...]:
    """(logits, weights, ids) of JetMoE, whose router orders slots by expert."""
    experts = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    return logits, *(values[slots.argsort()].view(len(logits), -1) for values in (weights, experts))
