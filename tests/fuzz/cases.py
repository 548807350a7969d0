"""Random layers and calls as plain numbers, which shrink, and the tensors that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe.config import MoEConfig
from moe.flow import Added, SwigluParams, TopK
from moe.gemm.config import ACTIVATIONS, PARAMETERS, SHUFFLE_ROWS, ActivationType, SwigluNumbers, WeightFormat
from moe.gemm.weight_format import pack_bias, pack_weights
from moe.routing.config import RoutingMethod

NUMBERS = {"alpha": 1.375, "beta": 0.75, "clamp_limit": 1.25}  # where the config has them
LAYOUTS = ("MajorK", "MajorMn", "BlockMajorK")
METHODS = tuple(method.value for method in RoutingMethod)
ACTIVATION_NAMES = tuple(member.name for member in ACTIVATIONS["portable"])
VALUES = ("plain", "ties", "nan", "inf")
MAX_KEPT = 256  # layers whose weights stay in memory, of a pool; with what entries make of one


@dataclass(frozen=True)
class Case:
    """One call. All tensors follow from these numbers."""

    num_tokens: int = 1
    hidden_size: int = 8
    intermediate_size: int = 8
    num_experts: int = 1
    top_k: int = 1
    method: str = "Renormalize"
    n_group: int = 0
    topk_group: int = 0
    scale: float = 1.0
    normalises: bool = True
    activation: str = "Swiglu"
    layout: str = "MajorK"
    is_shuffled: bool = False
    gate_up_order: str = "gate_up"
    first_local: int = 0
    num_local: int = 1
    tile_rows: int | None = None
    is_batch_invariant: bool = False
    swiglu: tuple[str, ...] = ()
    has_config_numbers: bool = False  # those of swiglu, of all experts alike
    biases: tuple[str, ...] = ()
    expert_bias_dtype: str = "bfloat16"
    weight_on: str = "output"
    added: str = ""  # how it is gated; "": nothing is added
    added_dtype: str = "bfloat16"
    logits_dtype: str = "float32"
    bias_dtype: str | None = None
    weights_dtype: str = "bfloat16"
    gives_output: bool = False
    gives_workspace: bool = False
    records: bool = False
    is_strided: bool = False  # hidden states, where an entry takes them so
    values: str = "plain"  # what else logits, hidden states and weights that are not read may be
    seed: int = 0
    weights_seed: int | None = (
        None  # of a layer in a pool, whose weights are the same in all its calls; None: the call's
    )

    @property
    def layer(self) -> Case:
        """Without what a call of the same layer may have otherwise."""
        call = {"num_tokens": 0, "gives_output": False, "gives_workspace": False, "records": False}
        return replace(self, **call, is_strided=False, values="plain", seed=0)

    def config(self) -> MoEConfig:
        return _config_of(self.layer)

    def _config(self) -> MoEConfig:
        return MoEConfig.create(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            method=self.method,
            n_group=self.n_group,
            topk_group=self.topk_group,
            routed_scaling_factor=self.scale,
            norm_topk_prob=self.normalises,
            activation=self.activation,
            weight_on=self.weight_on,
            swiglu=SwigluNumbers(**{name: NUMBERS[name] for name in self.swiglu}) if self.has_config_numbers else None,
            has_biases=len(self.biases) == 2,
            weight_format=self.weight_format,
            local_expert_offset=self.first_local,
            num_local_experts=self.num_local,
            tile_rows=self.tile_rows,
            is_batch_invariant=self.is_batch_invariant,
        )

    @property
    def is_gated(self) -> bool:
        return ActivationType[self.activation].is_gated

    @property
    def weight_format(self) -> WeightFormat:
        return WeightFormat(layout=self.layout, is_shuffled=self.is_shuffled, gate_up_order=self.gate_up_order)

    def flat(self) -> Case:
        """The same as the flat calls take it."""
        return replace(
            self,
            layout="BlockMajorK",
            gate_up_order="up_gate",
            biases=(),
            has_config_numbers=False,
            weight_on="output",
            added="",
            hidden_size=-(-self.hidden_size // 64) * 64,
            intermediate_size=-(-self.intermediate_size // 64) * 64,
            tile_rows=None,
            method="Renormalize" if self.method == "TopKSigmoid" else self.method,  # which has no number
        )


@functools.lru_cache(maxsize=MAX_KEPT)
def _config_of(layer: Case) -> MoEConfig:
    return layer._config()


@dataclass(frozen=True)
class LayerTensors:
    """What the calls of a layer share."""

    w1: Tensor  # logical, gate rows first
    w2: Tensor
    stored_w1: Tensor
    stored_w2: Tensor
    swiglu: SwigluParams | None
    biases: dict[str, Tensor]  # logical, of w1 and w2
    stored_biases: dict[str, Tensor]


@dataclass(frozen=True)
class Tensors:
    logits: Tensor  # [T, E]
    bias: Tensor | None
    hidden_states: Tensor
    topk: TopK  # of chosen experts, some of them no expert's
    added: Added | None
    is_plain: Tensor  # [T]: tokens of finite logits and states
    layer: LayerTensors


@st.composite
def cases(
    draw: st.DrawFn,
    multiple: int = 8,
    methods: Sequence[str] = METHODS,
    layouts: Sequence[str] = LAYOUTS,
    activations: Sequence[str] = ACTIVATION_NAMES,
) -> Case:
    """Any layer that the package takes, small, and any call of it.

    Args:
        multiple: of hidden and intermediate sizes; a larger one has fewer kernels to compile.
        methods, layouts, activations: one of these.
    """
    method = draw(st.sampled_from(methods))
    n_group = topk_group = 0
    num_experts = draw(st.integers(1, 40))
    if method == "DeepSeekV3" and draw(st.booleans()):
        n_group = draw(st.integers(2, 8))
        num_experts = n_group * draw(st.integers(2, 6))
        topk_group = draw(st.integers(1, n_group))
    choices = topk_group * num_experts // n_group if n_group else num_experts
    top_k = 1 if method == "Llama4" else draw(st.integers(1, min(choices, 10)))
    layout = draw(st.sampled_from(layouts))
    step = 64 if layout == "BlockMajorK" else multiple
    hidden_size, intermediate_size = (step * draw(st.integers(1, max(1, 144 // step))) for _ in range(2))
    activation = draw(st.sampled_from(activations))
    is_gated = ActivationType[activation].is_gated
    parameters = PARAMETERS.get(ActivationType[activation], ())
    is_shuffled = False
    rows = (intermediate_size * (2 if is_gated else 1), hidden_size)
    if not any(count % SHUFFLE_ROWS for count in rows):
        is_shuffled = draw(st.booleans())
    orders = ["gate_up", "up_gate", *([] if is_shuffled else ["interleaved"])]
    num_local = draw(st.integers(1, num_experts))
    return Case(
        num_tokens=draw(st.integers(0, 40)),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        method=method,
        n_group=n_group,
        topk_group=topk_group,
        scale=draw(st.sampled_from([1.0, 2.5, 0.125])) if method in ("DeepSeekV3", "MiniMax2") else 1.0,
        normalises=draw(st.booleans()),
        activation=activation,
        layout=layout,
        is_shuffled=is_shuffled,
        gate_up_order=draw(st.sampled_from(orders)),
        first_local=draw(st.integers(0, num_experts - num_local)),
        num_local=num_local,
        tile_rows=draw(st.sampled_from([None, 16, 32, 64, 128])),
        is_batch_invariant=draw(st.booleans()),
        swiglu=tuple(draw(st.sets(st.sampled_from(parameters)))) if parameters else (),
        has_config_numbers=draw(st.booleans()),
        biases=tuple(draw(st.sets(st.sampled_from(["w1", "w2"])))),
        expert_bias_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        weight_on=draw(st.sampled_from(["output", "input"])),
        added=draw(st.sampled_from(["", "alone", "number", "bfloat16", "float32"])),
        added_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        logits_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        bias_dtype=draw(st.sampled_from([None, "float32", "bfloat16"])),
        weights_dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        gives_output=draw(st.booleans()),
        gives_workspace=draw(st.booleans()),
        records=draw(st.booleans()),
        is_strided=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 1 << 16)),
    )


def tensors_of(case: Case, device: torch.device) -> Tensors:
    layer = _kept_layer_of(case.layer, device) if case.weights_seed is not None else _layer_of(case, case.seed, device)
    # A pool is for many calls: those of a GPU are made there.
    generator = torch.Generator(device if case.weights_seed is not None else "cpu").manual_seed(case.seed)
    new = {"generator": generator, "device": generator.device}
    num_tokens, shape = case.num_tokens, (case.num_tokens, case.top_k)
    # Steps that bfloat16 tells apart, in a random order: keys that differ by less than an error are left to the tests of routing.
    steps = torch.linspace(-4, 4, case.num_experts, device=generator.device)
    logits = steps[torch.rand(num_tokens, case.num_experts, **new).argsort(dim=1)].to(getattr(torch, case.logits_dtype))
    bias = None if case.bias_dtype is None else torch.randn(case.num_experts, **new) * 0.5
    hidden_states = torch.randn(num_tokens, case.hidden_size, **new).bfloat16()
    ids = torch.randint(-2, case.num_experts + 2, shape, dtype=torch.int32, **new)
    weights = torch.rand(shape, **new)
    added = added_of(case, new, device)
    is_plain = torch.ones(num_tokens, dtype=torch.bool, device=generator.device)
    if case.values == "ties":
        logits = logits.round() + 0.0  # no -0
    elif case.values != "plain":
        is_plain = torch.rand(num_tokens, **new) < 0.75
        is_other = torch.rand(logits.shape, **new) < 0.3
        is_low = torch.rand(logits.shape, **new) < 0.5
        numbers = (
            torch.where(is_low, -torch.inf, torch.inf) if case.values == "inf" else torch.full_like(logits, torch.nan)
        )
        logits = torch.where(is_other & ~is_plain[:, None], numbers.to(logits.dtype), logits)
        hidden_states = hidden_states.masked_fill(~is_plain[:, None] & (hidden_states > 1), torch.nan)
        is_read = (ids >= case.first_local) & (ids < case.first_local + case.num_local)
        weights = weights.masked_fill(~is_read, torch.nan)
    return Tensors(
        logits.to(device),
        None if bias is None else bias.to(getattr(torch, case.bias_dtype)).to(device),
        hidden_states.to(device),
        TopK(ids.to(device), weights.to(getattr(torch, case.weights_dtype)).to(device)),
        added,
        is_plain.to(device),
        layer,
    )


@functools.lru_cache(maxsize=MAX_KEPT)
def _kept_layer_of(layer: Case, device: torch.device) -> LayerTensors:
    assert layer.weights_seed is not None
    return _layer_of(layer, layer.weights_seed, device)


def _layer_of(case: Case, seed: int, device: torch.device) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * sizes[-1] ** -0.5).bfloat16()

    w1 = normal(case.num_local, case.intermediate_size * (1 + case.is_gated), case.hidden_size)
    w2 = normal(case.num_local, case.hidden_size, case.intermediate_size)
    stored = [
        pack_weights(weights, case.weight_format, is_gated=is_gated).to(device)
        for weights, is_gated in ((w1, case.is_gated), (w2, False))
    ]
    numbers = {name: (torch.rand(case.num_local, generator=generator) + 0.5).to(device) for name in sorted(case.swiglu)}
    if case.has_config_numbers:
        numbers = {name: torch.full_like(values, NUMBERS[name]) for name, values in numbers.items()}
    widths = {"w1": w1.shape[1], "w2": case.hidden_size}
    biases = {
        name: torch.randn(case.num_local, widths[name], generator=generator).to(getattr(torch, case.expert_bias_dtype))
        for name in sorted(case.biases)
    }
    stored_biases = {
        name: pack_bias(bias, case.weight_format, is_gated=name == "w1" and case.is_gated).to(device)
        for name, bias in biases.items()
    }
    return LayerTensors(
        w1.to(device),
        w2.to(device),
        *stored,
        SwigluParams(**numbers) if numbers else None,
        {name: bias.to(device) for name, bias in biases.items()},
        stored_biases,
    )


def added_of(case: Case, new: dict[str, Any], device: torch.device) -> Added | None:
    """The matrix and its gate; `new`: generator and device of random numbers."""
    if not case.added:
        return None
    values = torch.randn(case.num_tokens, case.hidden_size, **new)
    gate: Tensor | float | None = {"alone": None, "number": 0.3}.get(case.added)
    if case.added in ("bfloat16", "float32"):
        gate = torch.rand(case.num_tokens, **new).to(device, getattr(torch, case.added))
    return Added(values.to(device, getattr(torch, case.added_dtype)), gate)
