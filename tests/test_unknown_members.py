"""A member that an enum gets, and that code has no case for yet, is refused by name everywhere: nothing takes it for another."""

from __future__ import annotations

import ast
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import moe
from moe.cli.layer import NamedLayer, random_logits
from moe.expert_linear import expert_linear
from moe.flow import TopK
from moe.fused.few_tokens import config as few_tokens
from moe.fused.few_tokens.reference import few_token_gemm1_reference
from moe.gemm import config as gemm_config
from moe.gemm.checks import check_weights
from moe.gemm.config import ACTIVATIONS, ActivationType, GemmConfig, WeightFormat, WeightLayout
from moe.gemm.hopper.problem import LAYOUTS, fits
from moe.gemm.reference import activate_reference
from moe.gemm.weight_format import pack_weights, unpack_expert, unpack_weights, weight_strides
from moe.routing.config import RoutingConfig, RoutingMethod, RoutingMethodType
from moe.routing.kernels import router_for
from moe.routing.reference import select_experts_reference, weigh_experts
from moe.testing.problems import activated_in_float64, experts_in_float64, make_problem
from moe.tuning.table import LayerKey

Member = TypeVar("Member", bound=Enum)
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 4, "top_k": 2}


def add_member(monkeypatch: pytest.MonkeyPatch, enum: type[Member], name: str, value: Any) -> Member:
    """A member as if it stood in the enum's class, for the length of a test."""
    base = next(base for base in (int, str) if issubclass(enum, base))
    member = base.__new__(enum, value)
    member._name_, member._value_ = name, value
    monkeypatch.setattr(enum, "_member_names_", [*enum._member_names_, name])
    monkeypatch.setattr(enum, "_member_map_", enum._member_map_ | {name: member})
    monkeypatch.setattr(enum, "_value2member_map_", enum._value2member_map_ | {value: member})
    return member


@pytest.fixture(params=[True, False], ids=["gated", "not_gated"])
def activation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ActivationType:
    """One that the tables have, as if the portable kernels computed it, and no code."""
    member = add_member(monkeypatch, ActivationType, "Added", 77)
    table = "_GATED" if request.param else "_NOT_GATED"
    monkeypatch.setattr(gemm_config, table, (*getattr(gemm_config, table), member))
    monkeypatch.setitem(ACTIVATIONS, "portable", (*ACTIVATIONS["portable"], member))
    return member


def test_an_activation_that_no_table_has_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    member = add_member(monkeypatch, ActivationType, "Added", 77)
    with pytest.raises(ValueError, match=r"ActivationType\.Added \(77\): expected one with a case in .*_GATED"):
        assert member.is_gated
    for named in (member, 77, "Added"):
        with pytest.raises(ValueError, match="Added"):
            moe.MoEConfig.create(**SIZES, activation=named)


def test_an_activation_without_code_is_refused_where_it_is_computed(activation: ActivationType) -> None:
    config = moe.MoEConfig.create(**SIZES, activation="Added")
    problem = make_problem(config, 5)
    topk = TopK(torch.zeros(5, 2, dtype=torch.int32), torch.ones(5, 2).bfloat16())
    product = torch.zeros(1, config.gemm1.weight_rows)
    tensors = problem.hidden_states, problem.w1, problem.w2
    refusals = {
        "activate_reference": lambda: activate_reference(product, 0, config.gemm1, None),
        "activated_in_float64": lambda: activated_in_float64(product.double(), activation, 0),
        "moe/testing/problems": lambda: experts_in_float64(topk, *tensors, activation=activation),
        "moe/gemm/reference": lambda: moe.reference_pipeline(config)(problem.logits, *tensors),
    }
    for words, call in refusals.items():
        with pytest.raises(ValueError, match=rf"ActivationType\.Added \(77\): expected one with a case in .*{words}"):
            call()


def test_few_token_and_hopper_kernels_take_no_activation_but_those_of_their_tables(activation: ActivationType) -> None:
    gemms = {stage: getattr(moe.MoEConfig.create(**SIZES, activation="Added"), stage) for stage in ("gemm1", "gemm2")}
    assert not few_tokens.takes(gemms["gemm1"], gemms["gemm2"])
    known = " or ".join(member.name for member in few_tokens.ACTIVATIONS)
    with pytest.raises(ValueError, match=rf"gemm1\.activation: expected {known}, got Added"):
        few_tokens.FewTokenConfig(num_experts=4, top_k=2, **gemms)
    assert activation not in ACTIVATIONS["wide"] + ACTIVATIONS["swapped"]


def causes_of(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *causes_of(error.__cause__)]


def test_kernels_refuse_to_compile_for_an_activation_without_code(activation: ActivationType) -> None:
    pytest.importorskip("triton")
    from emulation.offline_driver import offline_gpu, unallocated

    from moe.gemm.portable.gemm1 import portable_gemm1

    config = moe.MoEConfig.create(**SIZES, activation="Added").gemm1
    numbers = {
        "row_of_slot": (5, 2), "token_of_row": (64,), "expert_of_tile": (4,), "row_limit_of_tile": (4,),
        "num_rows": (1,), "num_tiles": (1,),
    }  # fmt: skip
    tensors = {name: unallocated(*shape, dtype=torch.int32) for name, shape in numbers.items()}
    permutation = moe.Permutation(**tensors, tile_rows=16)
    weights = unallocated(*config.weight_shape)
    with offline_gpu(90), pytest.raises(Exception, match="activate") as raised:
        portable_gemm1(unallocated(5, 64), weights, permutation, config=config)
    assert "no such activation" in "".join(map(str, causes_of(raised.value)))


def test_a_named_layer_keeps_an_activation_that_it_does_not_know(activation: ActivationType) -> None:
    shape = NamedLayer("added", moe.MoEConfig.create(**SIZES, activation="Added")).shape
    assert shape.activation == "Added"
    assert shape.is_gated == activation.is_gated


def test_a_rule_without_code_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    add_member(monkeypatch, RoutingMethod, "ADDED", "Added")
    logits, ids = torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64)
    config = RoutingConfig.model_construct(
        **RoutingConfig(num_experts=8, top_k=2).model_dump() | {"method": RoutingMethod("Added")}
    )
    for call in (
        lambda: select_experts_reference(logits, config=config),
        lambda: weigh_experts(logits, ids, config=config),
        lambda: router_for(config, CPU, uses_pdl=False)[0](logits),
    ):
        with pytest.raises(
            ValueError, match=r"RoutingMethod\.ADDED: expected one with a case in moe/routing/reference\.py"
        ):
            call()


def test_a_rule_whose_weight_is_not_written_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe.routing import reference

    method = add_member(monkeypatch, RoutingMethod, "ADDED", "Added")
    config = RoutingConfig.model_construct(**RoutingConfig(num_experts=8, top_k=2).model_dump() | {"method": method})
    monkeypatch.setattr(reference, "_keys", lambda x, bias, config: x)
    with pytest.raises(ValueError, match=r"RoutingMethod\.ADDED: .*reference\.py, _weights"):
        select_experts_reference(torch.randn(3, 8), config=config)


def test_the_routing_kernel_takes_no_rule_that_it_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from moe.routing import topk
    from moe.routing.rules_device import rule_of

    assert tuple(RoutingMethod) == topk.METHODS
    for method in topk.METHODS:
        rule_of(RoutingConfig(num_experts=8, top_k=1, method=method))
    method = add_member(monkeypatch, RoutingMethod, "ADDED", "Added")
    config = RoutingConfig.model_construct(**RoutingConfig(num_experts=8, top_k=2).model_dump() | {"method": method})
    assert not topk.takes(config)
    with pytest.raises(ValueError, match="got method=Added"):
        topk.select_experts(torch.randn(3, 8), config=config)
    with pytest.raises(ValueError, match=r"RoutingMethod\.ADDED: .*rules_device\.py, rule_of"):
        rule_of(config)


def test_a_number_of_flashinfers_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_member(monkeypatch, RoutingMethodType, "Added", 11)
    with pytest.raises(ValueError, match="Unimplemented routing method of enum 11"):
        RoutingConfig(num_experts=8, top_k=2, method=11)


def test_a_layout_without_code_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = add_member(monkeypatch, WeightLayout, "Added", 9)
    added = WeightFormat.model_construct(layout=layout, is_shuffled=False, gate_up_order="gate_up")
    fields = {"num_experts": 4, "in_features": 128, "out_features": 64, "weight_format": added, "activation": None}
    config = GemmConfig.model_construct(**fields, kernel=None, tile=None)
    weights = torch.zeros(4, 64, 128).bfloat16()
    for call in (
        lambda: config.weight_shape,
        lambda: weight_strides(config),
        lambda: check_weights(config, "gemm2_weights", weights),
        lambda: pack_weights(weights, added, is_gated=False),
        lambda: unpack_weights(weights, added, is_gated=False),
        lambda: unpack_expert(weights[0], added, is_gated=False),
        lambda: expert_linear(weights[0], torch.zeros(64, dtype=torch.int64), weights, 9, False),
    ):
        with pytest.raises(ValueError, match=r"WeightLayout\.Added \(9\): expected one with a case in moe/gemm/"):
            call()
    assert not fits(config, 64, 128, (64,))
    assert not few_tokens.takes(config.model_copy(update={"weight_format": WeightFormat()}), config)
    assert layout not in LAYOUTS + few_tokens.LAYOUTS


def test_the_flat_call_and_tables_take_no_other_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    add_member(monkeypatch, WeightLayout, "Added", 9)
    config = moe.MoEConfig.create(**SIZES)
    key = LayerKey.of(config).model_dump() | {"layout": "Added"}
    with pytest.raises(ValueError, match="layout"):
        LayerKey(**key)
    with pytest.raises(ValueError, match="weight_layout must be BlockMajorK: expected 2, got 9"):
        moe.trtllm_bf16_moe(
            torch.randn(2, 4), None, torch.randn(2, 64).bfloat16(), *flat_weights(), 4, 2, None, None, 64, 0, 4, 1.0,
            routing_method_type=1, weight_layout=9,
        )  # fmt: skip


def flat_weights() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 1, 128, 64).bfloat16(), torch.zeros(4, 1, 64, 64).bfloat16()


def test_another_order_of_gate_and_up_is_refused_by_name() -> None:
    other = WeightFormat.model_construct(layout=WeightLayout.MajorK, is_shuffled=False, gate_up_order="mixed")
    config = GemmConfig.model_construct(
        num_experts=4, in_features=64, out_features=64, activation=ActivationType.Swiglu, weight_format=other, kernel=None, tile=None
    )  # fmt: skip
    weights = torch.zeros(4, 128, 64).bfloat16()
    gemm2 = GemmConfig(num_experts=4, in_features=64, out_features=64)
    few = few_tokens.FewTokenConfig.model_construct(num_experts=4, top_k=1, gemm1=config, gemm2=gemm2)
    topk = TopK(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1).bfloat16())
    for call in (
        lambda: pack_weights(weights, other, is_gated=True),
        lambda: unpack_expert(weights[0], other, is_gated=True),
        lambda: few_token_gemm1_reference(torch.zeros(1, 64).bfloat16(), weights, topk, config=few),
    ):
        with pytest.raises(ValueError, match=r"'mixed': expected one with a case in .*is_gate_first"):
            call()
    with pytest.raises(ValueError, match="gate_up_order"):
        WeightFormat(gate_up_order="mixed")


def test_another_load_of_the_command_line_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'added': expected one with a case in .*random_logits"):
        random_logits(3, 4, "added", torch.Generator())


def matches_of(path: Path) -> list[tuple[ast.Match, ast.stmt | None]]:
    """Each match statement, and what follows it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        for body in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(body, list):
                found += [(a, b) for a, b in zip(body, [*body[1:], None]) if isinstance(a, ast.Match)]
    return found


@pytest.mark.parametrize("path", sorted(Path(moe.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_every_match_ends_in_a_refusal(path: Path) -> None:
    for match, after in matches_of(path):
        if isinstance(match.subject, ast.Tuple):  # of booleans
            continue
        last = match.cases[-1]
        is_wild = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None and last.guard is None
        refuses = isinstance(last.body[-1] if is_wild else after, ast.Raise)
        assert refuses, f"{path.name}:{match.lineno}: what no case names falls through"
