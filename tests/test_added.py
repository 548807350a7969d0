"""A shared expert's result in the sum of the layer: by every entry, through both chains, checked and kept as all that is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_layer import SMALL
from torch import Tensor

import moe
from moe import Added, MoEConfig, TopK, build_pipeline, failing_calls, reference_pipeline
from moe.__main__ import main
from moe.call import LayerCall
from moe.failing_calls import read_call
from moe.testing.closeness import assert_close_to_exact
from moe.testing.problems import experts_in_float64, make_problem
from moe.tuning.tuned import tuned_pipeline

HIDDEN = SMALL["hidden_size"]


def random_added(num_tokens: int, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> Added:
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(num_tokens, HIDDEN, generator=generator).to(device, dtype)
    return Added(values, torch.rand(num_tokens, generator=generator).to(device))


def gated(added: Added) -> Tensor:
    gate = added.gate
    assert isinstance(gate, Tensor)
    return added.values.double() * gate.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
def test_layer_with_a_shared_expert_matches_float64(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, num_tokens, device=device)
    added = random_added(num_tokens, device, dtype=dtype)
    experts = (problem.hidden_states, problem.w1, problem.w2)
    topk = reference_pipeline(config).route(problem.logits)
    reference = reference_pipeline(config).run_experts(topk, *experts, added=added)
    exact = experts_in_float64(topk, *experts) + gated(added)
    for pipeline in (build_pipeline(config, device), tuned_pipeline(config, device)):
        assert_close_to_exact(pipeline(problem.logits, *experts, added=added), reference, exact)
        output = torch.full_like(problem.hidden_states, float("nan"))
        assert pipeline.run_experts(topk, *experts, output=output, added=added) is output
        assert_close_to_exact(output, reference, exact)


def test_a_matrix_alone_counts_once(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 5, device=device)
    values = torch.randn_like(problem.hidden_states)
    pipeline, arguments = build_pipeline(config, device), (problem.hidden_states, problem.w1, problem.w2)
    alone = pipeline(problem.logits, *arguments, added=values)
    assert torch.equal(alone, pipeline(problem.logits, *arguments, added=Added(values, 1)))
    assert not torch.equal(alone, pipeline(problem.logits, *arguments))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens_and_the_grouped_chain_add_alike(num_tokens: int, cuda: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, num_tokens, device=cuda)
    pipeline, added = build_pipeline(config, cuda), random_added(num_tokens, cuda)
    assert pipeline.fused is not None
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    fused, chain = (p(*arguments, added=added) for p in (pipeline, replace(pipeline, fused=None)))
    torch.testing.assert_close(fused, chain, rtol=2**-7, atol=1e-2)


def test_slices_add_it_where_the_caller_passes_it(device: torch.device) -> None:
    problem = make_problem(MoEConfig.create(**SMALL), 6, device=device)
    added = random_added(6, device)
    ids = torch.tensor([[0, 1], [6, 7], [-1, 8]] * 2, dtype=torch.int32, device=device)
    topk = TopK(ids, torch.full((6, 2), 0.5, device=device))
    config = MoEConfig.create(**SMALL, local_expert_offset=6, num_local_experts=2)
    weights = (problem.w1[6:].clone(), problem.w2[6:].clone())
    output = build_pipeline(config, device).run_experts(topk, problem.hidden_states, *weights, added=added)
    assert torch.equal(output[[0, 2, 3, 5]], gated(added)[[0, 2, 3, 5]].float().bfloat16())


def test_a_finalizer_of_ones_own_meets_it_only_where_it_is_passed() -> None:
    config = MoEConfig.create(**SMALL)
    problem, met = make_problem(config, 4), []
    ours = reference_pipeline(config)

    def plain(rows: Tensor, topk: TopK, permutation: moe.Permutation, *, output: Tensor | None = None) -> Tensor:
        return ours.finalize(rows, topk, permutation, output=output)

    def knowing(*args: Any, added: Added | None = None, **more: Any) -> Tensor:
        met.append(added)
        return ours.finalize(*args, added=added, **more)

    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    assert torch.equal(replace(ours, finalize=plain)(*arguments), ours(*arguments))
    added = random_added(4, torch.device("cpu"))
    swapped = replace(ours, finalize=knowing)
    assert torch.equal(swapped(*arguments, added=added), ours(*arguments, added=added))
    assert met == [added]


def test_a_finalize_that_adds_nothing_is_refused_in_a_call_that_adds_before_anything_runs() -> None:
    config = MoEConfig.create(**SMALL)
    problem, ours = make_problem(config, 4), reference_pipeline(config)
    met = []

    def route(*args: Any, **more: Any) -> Any:
        met.append("route")
        return ours.route(*args, **more)

    def plain(rows: Tensor, topk: TopK, permutation: Any, *, output: Tensor | None = None) -> Tensor:
        return ours.finalize(rows, topk, permutation, output=output)

    swapped = replace(ours, route=route, finalize=plain)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    with pytest.raises(
        ValueError, match=r"added: expected None, since the pipeline's finalize takes none.* give .*plain a k"
    ):
        swapped(*arguments, added=torch.ones_like(problem.hidden_states))
    assert met == []
    assert torch.equal(swapped(*arguments), ours(*arguments))


def test_what_cannot_be_added_is_refused(device: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    problem, pipeline = make_problem(config, 4, device=device), build_pipeline(config, device)
    arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
    output = torch.full_like(problem.hidden_states, 7.0)
    values = torch.ones_like(problem.hidden_states)
    wrong = [
        (r"added: expected \[T=4, H=128\], got \[3, 128\]", values[:3]),
        ("added: expected bfloat16 or float32, got float64", values.double()),
        (r"added\.gate: expected \[T=4\]", Added(values, torch.ones(5, device=device))),
        (r"added\.gate: expected a number that is finite in float32, got 1e\+39", Added(values, 1e39)),
        (r"added\.gate: expected a number that is finite in float32, got -1000", Added(values, -(10**400))),
        ("output: expected memory of its own, .* with added;", output),
        ("added: expected a tensor that needs no gradient", values.clone().requires_grad_()),
    ]
    for message, added in wrong:
        with pytest.raises(ValueError, match=message):
            pipeline(*arguments, output=output, added=added)
    with pytest.raises(TypeError, match=r"added: expected a torch\.Tensor \[T, H\] or a moe\.Added, got list"):
        pipeline(*arguments, output=output, added=[1.0])
    workspace = torch.zeros(pipeline.workspace(4).asked_bytes, dtype=torch.uint8, device=device)
    inside = workspace[: values.nbytes].view(torch.bfloat16).view(values.shape)
    with pytest.raises(ValueError, match=r"workspace_buffer: expected memory of its own, .* with added;"):
        pipeline(*arguments, workspace=workspace, added=inside)
    call = LayerCall(*arguments, added=Added(values))
    with pytest.raises(ValueError, match="added: expected None before finalize"):
        pipeline.run_unfinalized(call)
    assert (output == 7.0).all()


@pytest.mark.parametrize("gate", ["tensor", "number", "none"])
def test_a_failing_call_is_kept_with_it(gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(failing_calls, "FOLDER", str(tmp_path))
    monkeypatch.setattr(failing_calls, "_NUMBERS", iter(range(1, 100)))
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    values = torch.full_like(problem.hidden_states, float("nan"))
    of_name = {"tensor": torch.rand(4), "number": 0.3, "none": None}
    added = Added(values, of_name[gate])
    with pytest.warns(UserWarning, match="the failing call was kept"):
        reference_pipeline(config)(problem.logits, problem.hidden_states, problem.w1, problem.w2, added=added)
    (path,) = tmp_path.glob("moe-call-*.safetensors")
    found = read_call(path).call.added
    assert found is not None
    assert torch.equal(found.values, values) or found.values.isnan().all()
    if gate == "tensor":
        assert torch.equal(found.gate, added.gate)
    else:
        assert found.gate == added.gate


def test_a_call_that_was_refused_for_its_gate_is_kept_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(failing_calls, "FOLDER", str(tmp_path))
    monkeypatch.setattr(failing_calls, "_NUMBERS", iter(range(1, 100)))
    config = MoEConfig.create(**SMALL)
    problem = make_problem(config, 4)
    values = torch.full_like(problem.hidden_states, float("nan"))
    for gate in ("0.3", 10**400):
        added: Any = Added(values, gate)
        with (
            pytest.warns(UserWarning, match="the failing call was kept"),
            pytest.raises((TypeError, ValueError), match=r"added\.gate: expected"),
        ):
            reference_pipeline(config)(problem.logits, problem.hidden_states, problem.w1, problem.w2, added=added)
    monkeypatch.setattr(failing_calls, "FOLDER", None)
    path, _ = tmp_path.glob("moe-call-*.safetensors")
    assert main(["replay", str(path), "--device", "cpu"]) == 1
    assert f"{values.numel()} values of added are not finite" in capsys.readouterr().out


def test_a_captured_layer_follows_what_is_added(cuda: torch.device) -> None:
    config = MoEConfig.create(**SMALL)
    for num_tokens in (1, 40):
        problem, added = make_problem(config, num_tokens, device=cuda), random_added(num_tokens, cuda)
        pipeline = build_pipeline(config, cuda)
        arguments = (problem.logits, problem.hidden_states, problem.w1, problem.w2)
        pipeline(*arguments, added=added)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = pipeline(*arguments, added=added)
        added.values.neg_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, pipeline(*arguments, added=added))
