"""Random calls of every entry: each result within its roundings of float64, nothing leaked, no bound exceeded.

A short run belongs to all test runs, a long one is `make fuzz CALLS=100000 SEED=1`. What fails is shrunk to the smallest call,
and printed as a Case.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.cases import Case, Tensors, cases, tensors_of
from fuzz.exact import assert_within_roundings
from hypothesis import HealthCheck, Phase, given, seed, settings
from routing.oracle import assert_weights_are_exact_but_for_one_rounding, select_experts_exactly
from torch import Tensor

import moe
from moe import failing_calls
from moe.call import LayerCall
from moe.expert_ids import ID_DTYPES
from moe.expert_linear import expert_linear
from moe.flow import ExpertOutputs
from moe.gemm.config import ActivationType, WeightLayout
from moe.operators import run_experts
from moe.routing.config import RoutingMethodType
from moe.routing.reference import weigh_experts

CALLS = int(os.environ.get("MOE_FUZZ_CALLS", "400"))  # of all entries together: 20 s on a CPU
SEED = int(os.environ.get("MOE_FUZZ_SEED", "0"))
MARGIN = 1e-5  # keys nearer than this are told apart by errors of float32
POISON = -7


def logits_call(case: Case, device: torch.device) -> None:
    tensors, config = tensors_of(case, device), case.config()
    output, replay_out = written(case, device)
    pipeline = moe.build_pipeline(config, device)
    workspace = workspace_of(pipeline, case, device)
    with within(pipeline.workspace_bytes(case.num_tokens), case, device):
        result = pipeline(
            tensors.logits,
            tensors.hidden_states,
            tensors.stored_w1,
            tensors.stored_w2,
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
    tensors, config = tensors_of(case, device), case.config()
    _, replay_out = written(case, device)
    outputs = moe.build_pipeline(config, device).expert_outputs(
        tensors.logits,
        tensors.hidden_states,
        tensors.stored_w1,
        tensors.stored_w2,
        bias=tensors.bias,
        swiglu=given_numbers(case, tensors),
        routing_replay_out=replay_out,
        **biases_of(tensors),
    )
    if case.weight_on == "input":
        assert (outputs.weights == 1).all()
        expect_routed(summed(outputs), replay_out, case, tensors, is_finalized=False)
        return
    exact = select_experts_exactly(tensors.logits.cpu(), cpu(tensors.bias), config.routing)
    if exact.margin > MARGIN:
        assert_weights_are_exact_but_for_one_rounding(outputs.weights, exact)
    expect_routed(summed(outputs), replay_out, case, tensors, is_finalized=False)


def chosen_call(case: Case, device: torch.device) -> None:
    tensors, pipeline = tensors_of(case, device), moe.build_pipeline(case.config(), device)
    output, _ = written(case, device)
    weights = (tensors.stored_w1, tensors.stored_w2)
    workspace = workspace_of(pipeline, case, device)
    more = {"workspace": workspace, "added": tensors.added, **biases_of(tensors)}
    with within(pipeline.workspace_bytes(case.num_tokens), case, device):
        result = pipeline.run_experts(
            tensors.topk, tensors.hidden_states, *weights, swiglu=given_numbers(case, tensors), output=output, **more
        )
    assert output is None or result is output
    assert_within_roundings(result, tensors.topk.expert_ids, tensors.topk.weights, case, tensors)


def chosen_call_stopped_before_finalize(case: Case, device: torch.device) -> None:
    tensors, pipeline = tensors_of(case, device), moe.build_pipeline(case.config(), device)
    weights = (tensors.stored_w1, tensors.stored_w2)
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
        tensors.stored_w1,
        tensors.stored_w2,
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
        tensors.stored_w1,
        tensors.stored_w2,
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
        tensors.hidden_states,
        ids,
        tensors.topk.weights,
        tensors.stored_w1,
        tensors.stored_w2,
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
    weights = (tensors.w1.mT.contiguous() if layout == "MajorMn" else tensors.w1).to(device)
    result = expert_linear(tensors.hidden_states, ids, weights, layout_number, case.is_batch_invariant)
    is_absent = (ids < 0) | (ids >= case.num_experts)
    w1 = tensors.w1.double()[ids.clamp(0, case.num_experts - 1).cpu().long()]
    exact = torch.einsum("nk,nmk->nm", tensors.hidden_states.cpu().double(), w1)
    size = torch.einsum("nk,nmk->nm", tensors.hidden_states.cpu().double().abs(), w1.abs())
    exact[is_absent.cpu()] = 0.0
    error = (result.cpu().double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 2.0**-20 * size).all()


def kept_call(case: Case, device: torch.device) -> None:
    """A call of the references, written to a file as one that failed and read again, is the same call."""
    tensors, config = tensors_of(case, torch.device("cpu")), case.config()
    is_chosen = case.records
    entry = tensors.topk if is_chosen else tensors.logits
    call = LayerCall(
        entry,
        tensors.hidden_states,
        tensors.stored_w1,
        tensors.stored_w2,
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
    assert torch.equal(pipeline.run(kept.call), pipeline.run(call))


def replayed_routing(case: Case, device: torch.device) -> None:
    tensors, config = tensors_of(case, device), case.config().routing
    recorded = torch.full((case.num_tokens, case.top_k), POISON, dtype=torch.int16, device=device)
    routed = moe.build_pipeline(case.config(), device).route(tensors.logits, tensors.bias, replay_out=recorded)
    replayed = weigh_experts(tensors.logits, recorded, config=config)
    assert torch.equal(replayed.expert_ids, routed.expert_ids)
    assert (
        (replayed.weights.double() - routed.weights.double()).abs() <= 2.0**-7 * routed.weights.double().abs()
    ).all()


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
    @seed(SEED)
    @settings(
        max_examples=max(1, CALLS // len(ENTRIES)),
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(multiple=64 if device.type == "cuda" else 8))
    def run(case: Case) -> None:
        entry(case, device)

    run()


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
    return None if case.has_config_numbers else tensors.swiglu


def biases_of(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{name}_bias": bias for name, bias in tensors.stored_biases.items()}


def expect_routed(
    result: Tensor, replay_out: Tensor | None, case: Case, tensors: Tensors, *, is_finalized: bool = True
) -> None:
    """Raise unless the experts are those of the rule, recorded where that was asked, and the result is theirs."""
    exact = select_experts_exactly(tensors.logits.cpu(), cpu(tensors.bias), case.config().routing)
    if replay_out is not None:
        assert (replay_out[case.num_tokens :] == POISON).all()
    if exact.margin <= MARGIN:
        return
    ids = torch.tensor(exact.expert_ids, dtype=torch.int64).view(case.num_tokens, case.top_k)
    weights = torch.tensor(exact.weights, dtype=torch.float64).view(case.num_tokens, case.top_k)
    if replay_out is not None:
        assert torch.equal(replay_out[: case.num_tokens].cpu().long(), ids)
    if case.weight_on == "input":  # what follows is no longer linear in them, so as they were rounded
        routed = moe.build_pipeline(case.config(), result.device).route(tensors.logits, tensors.bias)
        assert torch.equal(routed.expert_ids.cpu().long(), ids)
        weights = routed.weights
    assert_within_roundings(result, ids, weights, case, tensors, is_finalized=is_finalized)


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
    swiglu = tensors.swiglu or moe.SwigluParams()
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


def cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
