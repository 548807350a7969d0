"""Every experts class of transformers: run on the layer as it runs itself, or refused with a reason."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.gemm.config import ActivationType, WeightLayout
from moe.integrations.hf_experts import Form, Gate, form_of
from moe.integrations.huggingface import check_model, register, use_moe
from moe.testing.closeness import relative_error

transformers = pytest.importorskip("transformers", minversion="5.17")

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 64, 32
SIZES = {
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "expert_ffn_hidden_size": INNER,
    "zero_expert_num": 2,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "hidden_activation": "gelu_pytorch_tanh",
    "swiglu_limit": 1.5,  # within what these weights give, so that it is told from none
    "swiglu_alpha": 1.7,
    "mlp_gate_softcap": 3.0,
    "mlp_up_softcap": 3.0,
    "post_norm_eps": 1e-6,
    "post_norm_scale": 1.0,
}
REFUSED = {
    "JetMoeParallelExperts": "runs its JetMoeParallelExperts itself",
    "Llama4TextExperts": "runs its Llama4TextExperts itself",
    "NllbMoeExperts": "runs its NllbMoeExperts itself",
    "SwitchTransformersExperts": "runs its SwitchTransformersExperts itself",
}


class Config:
    """What any of these classes asks of its config."""

    _experts_implementation = "eager"

    def __init__(self) -> None:
        vars(self).update(SIZES)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def experts_classes() -> list[str]:
    """family.file.class of those that not all tokens go to, read from the files: to import all takes a minute."""
    from transformers import models

    found = []
    for _, family, _ in pkgutil.iter_modules(models.__path__):
        for file in sorted((Path(models.__file__).parent / family).glob("modeling_*.py")):
            names = re.findall(r"^class (\w*Experts)\(", file.read_text(), re.MULTILINE)
            found += [f"{family}.{file.stem}.{name}" for name in names if "Shared" not in name]
    return found


CLASSES = experts_classes()


def build(where: str) -> nn.Module:
    family, file, name = where.split(".")
    experts_class = getattr(importlib.import_module(f"transformers.models.{family}.{file}"), name)
    if name == "JetMoeParallelExperts":
        experts = experts_class(NUM_EXPERTS, HIDDEN, INNER)
    elif name == "NllbMoeExperts":
        experts = experts_class(transformers.CONFIG_MAPPING["nllb-moe"](num_experts=2, d_model=16), 16)
    elif name == "SwitchTransformersExperts":
        experts = experts_class(transformers.CONFIG_MAPPING["switch_transformers"](num_experts=2, d_model=16, d_ff=16))
    elif name == "DbrxExperts":
        config = transformers.CONFIG_MAPPING["dbrx"]().ffn_config
        config.hidden_size, config.ffn_hidden_size, config.moe_num_experts = HIDDEN, INNER, NUM_EXPERTS
        experts = experts_class(config)
    else:
        experts = experts_class(Config())
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return experts.to(torch.bfloat16)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(19, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(19, TOP_K, generator=generator)
    return torch.randn(19, HIDDEN, generator=generator).bfloat16(), ids, weights.bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("where", CLASSES, ids=lambda where: where.rpartition(".")[2])
def test_the_layer_does_what_the_class_does_or_says_why_not(where: str) -> None:
    experts, name = build(where), where.rpartition(".")[2]
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            use_moe(experts)
        return
    exact = build(where).double()(*(t.double() if t.is_floating_point() else t for t in inputs()))
    eager = experts(*inputs())
    use_moe(experts)
    check_model(experts)
    ours = experts(*inputs())
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= max(1.2 * relative_error(eager, exact), 5e-3)


def gradients(experts: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the tokens, the routing weights and all parameters."""
    hidden_states, ids, weights = inputs()
    x, w = (tensor.to(dtype).requires_grad_() for tensor in (hidden_states, weights))
    generator = torch.Generator().manual_seed(2)
    output = experts(x, ids, w)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(dtype))
    return {"hidden_states": x.grad, "weights": w.grad} | {name: p.grad for name, p in experts.named_parameters()}


def rounded(values: Tensor) -> Tensor:
    """To bfloat16 and back, with the gradient of what was not rounded."""
    return values + (values.bfloat16().to(values.dtype) - values).detach()


@pytest.mark.parametrize("where", CLASSES, ids=lambda where: where.rpartition(".")[2])
def test_the_layer_has_the_gradients_of_the_class(where: str) -> None:
    if where.rpartition(".")[2] in REFUSED:
        pytest.skip("does not run")
    truth = build(where).double()
    if where.endswith("OpenAIPrivacyFilterExperts"):
        # Its own products are float32; here one that rounds onto the clamp's limit has the slope of the other side.
        apply_gate = truth._apply_gate
        truth._apply_gate = lambda gate_up: apply_gate(rounded(gate_up))
    exact, eager = gradients(truth, torch.float64), gradients(build(where), torch.bfloat16)
    ours = gradients(use_moe(build(where)), torch.bfloat16)
    for name, grad in exact.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            assert relative_error(ours[name], grad) <= max(1.2 * relative_error(eager[name], grad), 1e-2), name


def test_most_classes_run() -> None:
    names = [where.rpartition(".")[2] for where in CLASSES]
    assert sum(name in REFUSED for name in names) <= 4  # of which two run by the layer around them


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("GptOssExperts", Form(ActivationType.Swiglu, WeightLayout.MajorMn, Gate(1.7, 1.0, 1.5), True, True)),
        ("OpenAIPrivacyFilterExperts", Form(ActivationType.Swiglu, WeightLayout.MajorMn, Gate(1.7, 1.0, 1.5), False, True)),
        ("Inkling2Experts", Form(ActivationType.Situ, WeightLayout.MajorK, Gate(3.0, 3.0))),
        ("Gemma4TextExperts", Form(ActivationType.GegluTanh, WeightLayout.MajorK, Gate())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_biases_interleaved_rows_and_gelu_run_fused(name: str, form: Form) -> None:
    where = [where for where in CLASSES if where.endswith(f".{name}")]
    if not where:
        pytest.skip(f"this transformers has no {name}")
    assert form_of(build(where[0]), "experts") == form


def test_all_but_these_run_on_the_layers_kernels() -> None:
    apart = set()
    for where in CLASSES:
        name = where.rpartition(".")[2]
        if name not in REFUSED | dict.fromkeys(("DbrxExperts", "LongcatFlashExperts", "Step3p7Experts")):
            form = form_of(build(where), name)
            apart |= {name} if form.activation is None else set()
    assert apart == set(), "beside DbrxExperts, whose gate and up lie apart"


def test_an_own_gate_is_tried_before_a_model_is_compiled() -> None:
    register()
    where = [where for where in CLASSES if where.endswith("DeepseekV4Experts")]
    if not where:
        pytest.skip("this transformers has no experts with a gate of their own that the layer has")
    experts = use_moe(build(where[0]))
    with torch.no_grad():
        expected = experts(*inputs())
        assert torch.equal(torch.compile(experts, fullgraph=True, backend="eager")(*inputs()), expected)
