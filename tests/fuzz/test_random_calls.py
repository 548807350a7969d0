"""Random calls of every entry: each result within its roundings of float64, nothing leaked, no bound exceeded.

A short run belongs to all test runs, a long one is `make fuzz CALLS=100000 SEED=1`. What fails is shrunk to the smallest call,
and printed as a Case. A GPU compiles kernels for each layer; with LAYERS=40 all calls are of 40 layers.
"""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.cases import MAX_KEPT, Case, Tensors, cases, tensors_of
from fuzz.exact import (
    MARGIN,
    assert_within_roundings,
    of_all_experts,
    of_each_expert,
    routed_exactly,
    select_experts_in_float64,
)
from fuzz.pool import calls_of, layers_of
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from routing.oracle import BF16_HALF_ULP, FLOAT32_NOISE, select_experts_exactly
from torch import Tensor

import moe
from moe import failing_calls
from moe.call import LayerCall
from moe.expert_ids import ID_DTYPES
from moe.expert_linear import expert_linear
from moe.flow import ExpertOutputs
from moe.gemm.config import ACTIVATIONS, ActivationType, WeightLayout
from moe.operators import run_experts
from moe.routing.config import RoutingMethod, RoutingMethodType
from moe.routing.reference import weigh_experts

CALLS = int(os.environ.get("MOE_FUZZ_CALLS", "400"))  # of all entries together: 20 s on a CPU
SEED = int(os.environ.get("MOE_FUZZ_SEED", "0"))
LAYERS = int(os.environ.get("MOE_FUZZ_LAYERS", "0"))  # of which all calls are; 0: each call has its own
POISON = -7


def logits_call(case: Case, device: torch.device) -> None:
    tensors = tensors_of(case, device)
    output, replay_out = written(case, device)
    pipeline = pipeline_of(case.layer, device)
    workspace = workspace_of(pipeline, case, device)
    with within(pipeline.workspace_bytes(case.num_tokens), case, device):
        result = pipeline(
            tensors.logits,
            tensors.hidden_states,
            tensors.layer.stored_w1,
            tensors.layer.stored_w2,
            bias=tensors.bias,
            swiglu=given_numbers(case, tensors),
            output=output,
            routing_replay_out=replay_out,
            workspace=workspace,
            added=tensors.added,
            **biases_of(tensors),
        )
    assert output is None or result is output
    expect_routed(result, replay_out, case, tensors)


def logits_call_stopped_before_finalize(case: Case, device: torch.device) -> None:
    tensors = tensors_of(case, device)
    _, replay_out = written(case, device)
    outputs = pipeline_of(case.layer, device).expert_outputs(
        tensors.logits,
        tensors.hidden_states,
        tensors.layer.stored_w1,
        tensors.layer.stored_w2,
        bias=tensors.bias,
        swiglu=given_numbers(case, tensors),
        routing_replay_out=replay_out,
        **biases_of(tensors),
    )
    if case.weight_on == "input":
        assert (outputs.weights == 1).all()
        expect_routed(summed(outputs), replay_out, case, tensors, is_finalized=False)
        return
    exact = routed_exactly(case, tensors)
    error = (outputs.weights.double() - exact.weights).abs()
    is_near = error <= exact.weights.abs() * (BF16_HALF_ULP + FLOAT32_NOISE)
    is_same = (outputs.weights == exact.weights) | (
        outputs.weights.isnan() & exact.weights.isnan()
    )  # of what is not finite
    assert (is_near | is_same | ~exact.is_decided[:, None]).all()
    expect_routed(summed(outputs), replay_out, case, tensors, is_finalized=False)


def chosen_call(case: Case, device: torch.device) -> None:
    tensors, pipeline = tensors_of(case, device), pipeline_of(case.layer, device)
    output, _ = written(case, device)
    weights = (tensors.layer.stored_w1, tensors.layer.stored_w2)
    workspace = workspace_of(pipeline, case, device)
    more = {"workspace": workspace, "added": tensors.added, **biases_of(tensors)}
    with within(pipeline.workspace_bytes(case.num_tokens), case, device):
        result = pipeline.run_experts(
            tensors.topk, tensors.hidden_states, *weights, swiglu=given_numbers(case, tensors), output=output, **more
        )
    assert output is None or result is output
    assert_within_roundings(result, tensors.topk.expert_ids, tensors.topk.weights, case, tensors)


def chosen_call_stopped_before_finalize(case: Case, device: torch.device) -> None:
    tensors, pipeline = tensors_of(case, device), pipeline_of(case.layer, device)
    weights = (tensors.layer.stored_w1, tensors.layer.stored_w2)
    outputs = pipeline.run_experts_unfinalized(
        tensors.topk, tensors.hidden_states, *weights, swiglu=given_numbers(case, tensors), **biases_of(tensors)
    )
    if case.weight_on == "input":
        assert torch.equal(outputs.weights, torch.ones_like(tensors.topk.weights))
    else:
        assert outputs.weights is tensors.topk.weights
    is_local = (tensors.topk.expert_ids >= case.first_local) & (
        tensors.topk.expert_ids < case.first_local + case.num_local
    )
    assert torch.equal(outputs.row_of_slot >= 0, is_local)
    assert outputs.row_of_slot[is_local].unique().numel() == int(is_local.sum())
    chosen = (tensors.topk.expert_ids, tensors.topk.weights)
    assert_within_roundings(summed(outputs), *chosen, case, tensors, is_finalized=False)


def flat_call(case: Case, device: torch.device) -> None:
    case = case.flat()
    tensors = tensors_of(case, device)
    output, replay_out = written(case, device)
    result = moe.trtllm_bf16_moe(
        tensors.logits,
        tensors.bias,
        tensors.hidden_states,
        tensors.layer.stored_w1,
        tensors.layer.stored_w2,
        **numbers_of(case),
        norm_topk_prob=case.normalises,
        routing_replay_out=replay_out,
        output=output,
        **parameters_of(tensors),
        is_batch_invariant=case.is_batch_invariant,
    )
    assert output is None or result is output
    expect_routed(result, replay_out, case, tensors)


def flat_call_of_chosen_experts(case: Case, device: torch.device) -> None:
    case = case.flat()
    tensors = tensors_of(case, device)
    output, _ = written(case, device)
    topk = tensors.topk
    is_packed = case.records and topk.weights.dtype is torch.bfloat16
    packed = (topk.expert_ids << 16) | (topk.weights.view(torch.int16).to(torch.int32) & 0xFFFF) if is_packed else None
    result = moe.trtllm_bf16_routed_moe(
        (topk.expert_ids, topk.weights) if packed is None else packed,
        tensors.hidden_states,
        tensors.layer.stored_w1,
        tensors.layer.stored_w2,
        **numbers_of(case),
        output=output,
        **parameters_of(tensors),
        is_batch_invariant=case.is_batch_invariant,
    )
    assert_within_roundings(result, topk.expert_ids, topk.weights, case, tensors)


def experts_of_a_model(case: Case, device: torch.device) -> None:
    layout = "MajorMn" if case.layout == "MajorMn" else "MajorK"
    case = Case(
        **vars(case)
        | {"layout": layout, "is_shuffled": False, "gate_up_order": "gate_up", "swiglu": (), "first_local": 0}
        | {"num_local": case.num_experts, "biases": (), "weight_on": "output", "added": "", "has_config_numbers": False}
    )
    tensors = tensors_of(case, device)
    dtype = ID_DTYPES[case.seed % len(ID_DTYPES)]
    ids = tensors.topk.expert_ids.to(
        dtype
    )  # of which -1 is the largest number in an unsigned one, and no expert either
    result = run_experts(
        tensors.hidden_states.mT.contiguous().mT if case.is_strided else tensors.hidden_states,
        ids.mT.contiguous().mT if case.is_strided else ids,
        tensors.topk.weights,
        tensors.layer.stored_w1,
        tensors.layer.stored_w2,
        int(ActivationType[case.activation]),
        int(WeightLayout[layout]),
        case.is_batch_invariant,
    )
    assert_within_roundings(result, tensors.topk.expert_ids, tensors.topk.weights, case, tensors)


def matrix_of_experts(case: Case, device: torch.device) -> None:
    layout = "MajorMn" if case.layout == "MajorMn" else "MajorK"
    case = Case(
        **vars(case)
        | {"layout": layout, "is_shuffled": False, "swiglu": (), "num_local": case.num_experts, "first_local": 0}
        | {"biases": (), "gate_up_order": "gate_up"}
    )
    tensors = tensors_of(case, device)
    ids = tensors.topk.expert_ids[:, 0].to(ID_DTYPES[case.seed % 2])
    layout_number = int(WeightLayout[layout])
    weights = (tensors.layer.w1.mT.contiguous() if layout == "MajorMn" else tensors.layer.w1).to(device)
    result = expert_linear(tensors.hidden_states, ids, weights, layout_number, case.is_batch_invariant)
    is_absent = (ids < 0) | (ids >= case.num_experts)
    w1, rows = tensors.layer.w1.double()[ids.clamp(0, case.num_experts - 1).long()], tensors.hidden_states.double()
    exact = torch.einsum("nk,nmk->nm", rows, w1).masked_fill(is_absent[:, None], 0.0)
    size = torch.einsum("nk,nmk->nm", rows.abs(), w1.abs())
    error = (result.double() - exact).abs()
    assert ((error <= 2.0**-8 * exact.abs() + 2.0**-20 * size) | ~tensors.is_plain[:, None]).all()


def kept_call(case: Case, device: torch.device) -> None:
    """A call of the references, written to a file as one that failed and read again, is the same call."""
    case = replace(case, num_tokens=case.num_tokens % 41)
    tensors, config = tensors_of(case, torch.device("cpu")), case.config()
    is_chosen = case.records
    entry = tensors.topk if is_chosen else tensors.logits
    call = LayerCall(
        entry,
        tensors.hidden_states,
        tensors.layer.stored_w1,
        tensors.layer.stored_w2,
        given_numbers(case, tensors),
        None if is_chosen else tensors.bias,
        is_chosen=is_chosen,
        added=tensors.added,
        **biases_of(tensors),
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("ignore")
        patched.setattr(failing_calls, "FOLDER", folder)
        patched.setattr(failing_calls, "_NUMBERS", iter([1]))
        failing_calls._keep(config, call, {}, "none", is_finalized=True)
        (path,) = Path(folder).iterdir()
        kept = failing_calls.read_call(path)
    assert kept.config == config
    pipeline = moe.reference_pipeline(config)
    results = pipeline.run(kept.call), pipeline.run(call)
    assert torch.equal(*(result.view(torch.int16) for result in results))  # NaN too


def replayed_routing(case: Case, device: torch.device) -> None:
    tensors, config = tensors_of(case, device), case.config().routing
    recorded = torch.full((case.num_tokens, case.top_k), POISON, dtype=torch.int16, device=device)
    routed = pipeline_of(case.layer, device).route(tensors.logits, tensors.bias, replay_out=recorded)
    replayed = weigh_experts(tensors.logits, recorded, config=config)
    assert torch.equal(replayed.expert_ids, routed.expert_ids)
    again, before = replayed.weights.double(), routed.weights.double()
    is_same = (again == before) | (again.isnan() & before.isnan())
    assert (((again - before).abs() <= 2.0**-7 * before.abs()) | is_same).all()


ENTRIES: list[Callable[[Case, torch.device], None]] = [
    logits_call,
    logits_call_stopped_before_finalize,
    chosen_call,
    chosen_call_stopped_before_finalize,
    flat_call,
    flat_call_of_chosen_experts,
    experts_of_a_model,
    matrix_of_experts,
    kept_call,
    replayed_routing,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_random_calls(entry: Callable[[Case, torch.device], None], device: torch.device) -> None:
    # A GPU compiles a kernel for each width: of few widths more calls can be made.
    drawn = cases(multiple=64 if device.type == "cuda" else 8) if not LAYERS else calls_of(layers_of(SEED, LAYERS))
    run_calls(entry, drawn, device, max(1, CALLS // len(ENTRIES)))


def run_calls(
    entry: Callable[[Case, torch.device], None], drawn: st.SearchStrategy[Case], device: torch.device, count: int
) -> None:
    @seed(SEED)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def run(case: Case) -> None:
        entry(case, device)

    run()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_random_calls_of_a_few_layers(entry: Callable[[Case, torch.device], None], device: torch.device) -> None:
    run_calls(entry, calls_of(layers_of(SEED, 2)), device, 6)


def test_a_pool_has_every_rule_activation_and_layout_and_is_the_same_again() -> None:
    layers = layers_of(3, 12)
    assert layers == layers_of(3, 12) != layers_of(4, 12)
    assert {layer.method for layer in layers} == {method.value for method in RoutingMethod}
    assert {layer.activation for layer in layers} == {member.name for member in ACTIVATIONS["portable"]}
    assert {layer.layout for layer in layers} == {layout.name for layout in WeightLayout}


@given(cases())
@settings(max_examples=30, deadline=None, database=None, derandomize=True)
def test_products_of_all_experts_are_those_of_each(case: Case) -> None:
    tensors = tensors_of(replace(case, values="plain"), torch.device("cpu"))
    arguments = (tensors.topk.expert_ids.long(), tensors.topk.weights, case, tensors)
    for all_at_once, one_by_one in zip(of_all_experts(*arguments), of_each_expert(*arguments), strict=True):
        torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-12, atol=1e-12)


@given(cases())
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_routing_in_float64_is_that_of_pythons_floats(case: Case) -> None:
    case = replace(case, values="ties" if case.values == "ties" else "plain")
    tensors, config = tensors_of(case, torch.device("cpu")), case.config().routing
    at_once = select_experts_in_float64(tensors.logits, tensors.bias, config)
    exact = select_experts_exactly(tensors.logits, tensors.bias, config)
    if exact.margin > MARGIN:
        assert at_once.is_decided.all()
        assert at_once.expert_ids.tolist() == exact.expert_ids
    weights = torch.tensor(exact.weights, dtype=torch.float64).view_as(at_once.weights)
    is_same = (at_once.expert_ids == torch.tensor(exact.expert_ids, dtype=torch.int64).view_as(at_once.expert_ids)).all(
        dim=1
    )
    assert (is_same | ~at_once.is_decided).all()
    torch.testing.assert_close(at_once.weights[is_same], weights[is_same], rtol=1e-9, atol=1e-12)


@functools.lru_cache(maxsize=MAX_KEPT)
def pipeline_of(layer: Case, device: torch.device) -> moe.MoEPipeline:
    return moe.build_pipeline(layer.config(), device)


def written(case: Case, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """output and routing_replay_out, filled with what no call may leave there."""
    output = torch.full((case.num_tokens, case.hidden_size), float("nan"), dtype=torch.bfloat16, device=device)
    replay_out = torch.full((case.num_tokens + 3, case.top_k), POISON, dtype=torch.int16, device=device)
    return (output if case.gives_output else None), (replay_out if case.records else None)


def workspace_of(pipeline: moe.MoEPipeline, case: Case, device: torch.device) -> Tensor | None:
    """As small as may be, filled with what is NaN as a number and out of bounds as an index."""
    if not case.gives_workspace:
        return None
    return torch.full((pipeline.workspace(case.num_tokens).asked_bytes,), 0x7F, dtype=torch.uint8, device=device)


def given_numbers(case: Case, tensors: Tensors) -> moe.SwigluParams | None:
    """What a call brings: nothing where its config has the numbers."""
    return None if case.has_config_numbers else tensors.layer.swiglu


def biases_of(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{name}_bias": bias for name, bias in tensors.layer.stored_biases.items()}


def expect_routed(
    result: Tensor, replay_out: Tensor | None, case: Case, tensors: Tensors, *, is_finalized: bool = True
) -> None:
    """Raise unless the experts are those of the rule, recorded where that was asked, and the result is theirs."""
    exact = routed_exactly(case, tensors)
    ids, weights, is_decided = exact
    if replay_out is not None:
        assert (replay_out[case.num_tokens :] == POISON).all()
        assert ((replay_out[: case.num_tokens].long() == ids) | ~is_decided[:, None]).all()
    if case.weight_on == "input":  # what follows is no longer linear in them, so as they were rounded
        routed = pipeline_of(case.layer, result.device).route(tensors.logits, tensors.bias)
        assert ((routed.expert_ids.long() == ids) | ~is_decided[:, None]).all()
        weights = routed.weights
    assert_within_roundings(result, ids, weights, case, tensors, is_finalized=is_finalized, is_checked=is_decided)


def summed(outputs: ExpertOutputs) -> Tensor:
    """[T, H] float64 of rows, weights and map."""
    is_local = outputs.row_of_slot >= 0
    rows = outputs.rows[outputs.row_of_slot.clamp(min=0).long()].double() if len(outputs.rows) else None
    if rows is None:
        return outputs.weights.new_zeros(len(outputs.weights), outputs.rows.shape[1], dtype=torch.float64)
    return torch.where(is_local[..., None], outputs.weights[..., None].double() * rows, 0.0).sum(dim=1)


def numbers_of(case: Case) -> dict[str, Any]:
    return {
        "num_experts": case.num_experts,
        "top_k": case.top_k,
        "n_group": case.n_group or None,
        "topk_group": case.topk_group or None,
        "intermediate_size": case.intermediate_size,
        "local_expert_offset": case.first_local,
        "local_num_experts": case.num_local,
        "routed_scaling_factor": case.scale,
        "routing_method_type": RoutingMethodType[case.method],
        "use_shuffled_weight": case.is_shuffled,
        "activation_type": ActivationType[case.activation],
    }


def parameters_of(tensors: Tensors) -> dict[str, Tensor | None]:
    swiglu = tensors.layer.swiglu or moe.SwigluParams()
    return {"gemm1_alpha": swiglu.alpha, "gemm1_beta": swiglu.beta, "gemm1_clamp_limit": swiglu.clamp_limit}


@contextmanager
def within(bound: int, case: Case, device: torch.device) -> Iterator[None]:
    """On a GPU: a call takes no more memory than it says, and holds none of it afterwards but its result."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    output = -(-case.num_tokens * case.hidden_size * 2 // 512) * 512
    assert torch.cuda.max_memory_allocated(device) - before <= bound + output + (1 << 20)  # a cached block is not split
    assert torch.cuda.memory_allocated(device) - before <= output + (1 << 20)
