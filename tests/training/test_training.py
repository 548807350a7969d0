"""The layer under autograd: gradients against float64, bits of the inference pipeline, what is kept, what is swapped."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from gemm.backward.cases import BackwardCase
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training.layers import NAMES, exact_layer, leaves_of, logits_for, make_layer, trained

import moe
from moe import checks
from moe.flow import SwigluParams, TopK
from moe.gemm.config import WeightFormat
from moe.routing.config import RoutingMethod
from moe.stages import CheckedStage
from moe.testing.closeness import assert_close_to_exact, relative_error
from moe.training.experts import GradBuffers

STAGES = ("gemm1_keeping", "gemm2_dgrad", "gemm1_dgrad", "gemm1_wgrad", "gemm2_wgrad", "swiglu_gradients")


def assert_near_exact(case: BackwardCase, training: moe.TrainingPipeline) -> None:
    output, leaves = trained(training, case)
    expert_ids = training.at(len(case.hidden_states)).route(leaves.logits.detach()).expert_ids
    exact = exact_layer(case, expert_ids)
    for name, grad in leaves.grads.items():
        assert grad.isfinite().all(), name
        assert grad.dtype == getattr(leaves, name).dtype
        assert relative_error(grad, exact[name]) <= 1e-2, name
    assert output.isfinite().all()


@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33, 300])
def test_gradients_are_near_those_of_float64(device, poisoned_memory, num_tokens, activation):
    assert_near_exact(*make_layer(device, num_tokens=num_tokens, activation=activation, tile_rows=None))


@pytest.mark.parametrize("method", [m for m in RoutingMethod if m is not RoutingMethod.LLAMA4], ids=lambda m: m.value)
def test_logits_of_every_rule_get_their_gradient(device, method):
    case, _ = make_layer(device, num_tokens=33, num_experts=8)
    config = case.config.model_copy(update={"routing": moe.RoutingConfig(num_experts=8, top_k=2, method=method)})
    case = case._replace(config=config)
    assert_near_exact(case, moe.build_training_pipeline(config, device))


def test_one_rank_of_several(device, poisoned_memory):
    assert_near_exact(*make_layer(device, num_tokens=33, num_experts=8, num_local_experts=3, local_expert_offset=2))


@pytest.mark.parametrize("recompute", [False, True])
def test_one_expert_that_takes_all_and_slots_of_nobody(device, poisoned_memory, recompute):
    case, training = make_layer(device, num_tokens=40, recompute=recompute)
    ids = torch.full((40, 2), -1, dtype=torch.int32, device=device)
    ids[:, 0] = 3
    leaves = leaves_of(case)
    weights = case.topk.weights.clone().requires_grad_()
    training.run_experts(TopK(ids, weights), *leaves[1:]).backward(case.grad_output)
    others = [expert for expert in range(5) if expert != 3]
    assert not leaves.w1.grad[others].any()
    assert not leaves.w2.grad[others].any()
    assert not weights.grad[:, 1].any()
    assert weights.grad[:, 0].all()
    assert leaves.w1.grad[3].any()
    assert leaves.hidden_states.grad.isfinite().all()


def test_swiglus_parameters_get_gradients(device):
    values = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 0.701171875}
    parameters = {name: torch.full((5,), value, device=device, requires_grad=True) for name, value in values.items()}
    case, training = make_layer(device, num_tokens=33, swiglu=SwigluParams(**parameters))
    from gemm.backward.cases import exact_gradients

    training.run_experts(case.topk, *leaves_of(case)[1:], swiglu=case.swiglu).backward(case.grad_output)
    exact = exact_gradients(case._replace(swiglu=SwigluParams(**{k: v.detach() for k, v in parameters.items()})))
    for name, parameter in parameters.items():
        assert relative_error(parameter.grad, getattr(exact.swiglu, name)) <= 1e-2, name


@pytest.mark.parametrize(
    "weight_format", [WeightFormat(layout="MajorMn"), WeightFormat(gate_up_order="up_gate")], ids=str
)
def test_other_weight_formats_get_gradients_in_their_own(device, weight_format):
    from gemm.backward.cases import exact_gradients

    case, training = make_layer(device, num_tokens=33, weight_format=weight_format)
    leaves, weights = leaves_of(case), case.topk.weights.clone().requires_grad_()
    training.run_experts(TopK(case.topk.expert_ids, weights), *leaves[1:]).backward(case.grad_output)
    exact = exact_gradients(case)
    for name in NAMES[1:]:
        assert relative_error(getattr(leaves, name).grad, getattr(exact, name)) <= 1e-2, name
    assert relative_error(weights.grad, exact.weights) <= 1e-2


@pytest.mark.parametrize("name", ["hidden_states", "w1", "w2"])
def test_no_element_is_further_off_than_the_references_allow(device, name):
    case, training = make_layer(device, num_tokens=200, hidden_size=128, intermediate_size=64)
    _, leaves = trained(training, case)
    on_cpu = BackwardCase(*(value.cpu() if isinstance(value, Tensor) else value for value in case))
    _, reference = trained(moe.build_training_pipeline(case.config, "cpu"), on_cpu)
    ids = training.at(200).route(leaves.logits.detach()).expert_ids
    exact = exact_layer(case, ids)[name].flatten(0, -2)
    assert_close_to_exact(leaves.grads[name].flatten(0, -2), reference.grads[name].flatten(0, -2).to(device), exact)


@pytest.mark.parametrize("num_tokens", [1, 7, 33, 300])
@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_has_the_bits_of_the_inference_pipeline(device, num_tokens, recompute, is_batch_invariant):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
    config = moe.MoEConfig.create(**sizes, is_batch_invariant=is_batch_invariant)
    case, _ = make_layer(device, num_tokens=num_tokens, **sizes, tile_rows=None)
    training = moe.build_training_pipeline(config, device, recompute=recompute)
    output, leaves = trained(training, case)
    tensors = [tensor.detach() for tensor in leaves]
    assert torch.equal(output, moe.build_pipeline(config, device)(*tensors))


def test_a_batch_invariant_layer_trains_on_the_bits_that_it_generated_in_other_batches(device):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_experts": 8, "top_k": 2}
    config = moe.MoEConfig.create(**sizes, is_batch_invariant=True)
    case, _ = make_layer(device, num_tokens=70, **sizes)
    generator, training = moe.build_pipeline(config, device), moe.build_training_pipeline(config, device)
    leaves = leaves_of(case)
    tensors = [tensor.detach() for tensor in leaves]
    replay = torch.empty(70, 2, dtype=torch.int16, device=device)
    parts = []
    for first, last in ((0, 1), (1, 33), (33, 70)):
        x, logits = tensors[1][first:last].clone(), tensors[0][first:last].clone()
        parts.append(generator(logits, x, *tensors[2:], routing_replay_out=replay[first:last]))
    output = training.replay(leaves.logits, replay, *leaves[1:])
    if device.type == "cuda":  # on a CPU sums may follow the number of rows
        assert torch.equal(output, torch.cat(parts))
    else:
        torch.testing.assert_close(output, torch.cat(parts), atol=1e-2, rtol=1e-2)
    output.backward(case.grad_output)
    exact = exact_layer(case._replace(config=config), replay.int())
    for name, grad in leaves.grads.items():
        assert relative_error(grad, exact[name]) <= 1e-2, name


def test_chosen_experts_are_recorded(device):
    case, training = make_layer(device, num_tokens=7)
    with torch.inference_mode():
        replay = torch.full((9, 2), -5, dtype=torch.int16, device=device)
    _, leaves = trained(training, case, routing_replay_out=replay)
    chosen = training.at(7).route(leaves.logits.detach()).expert_ids
    assert torch.equal(replay[:7].int(), chosen)
    assert (replay[7:] == -5).all()


def test_twenty_runs_have_the_same_bits(device):
    case, training = make_layer(device, num_tokens=200)
    first = trained(training, case)
    for _ in range(20):
        output, leaves = trained(training, case)
        assert torch.equal(output, first[0])
        assert all(torch.equal(leaves.grads[name], first[1].grads[name]) for name in NAMES)


def test_what_is_made_anew_gives_the_bits_of_what_was_kept(device):
    case, training = make_layer(device, num_tokens=200, tile_rows=None)
    _, kept = trained(training, case)
    _, anew = trained(moe.build_training_pipeline(case.config, device, recompute=True), case)
    for name in NAMES:
        assert torch.equal(kept.grads[name], anew.grads[name]), name


class Recorder:
    """Stages that tell that they ran."""

    def __init__(self, training: moe.TrainingPipeline) -> None:
        self.names: list[str] = []
        stages = {name: self._recorded(name, getattr(training, name)) for name in STAGES}
        self.training = dataclasses.replace(training, **stages)

    def _recorded(self, name: str, stage: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            self.names.append(name)
            return stage(*args, **more)

        return run


@pytest.mark.parametrize(
    ("frozen", "skipped"),
    [
        ((), {"swiglu_gradients"}),
        (("w1", "w2"), {"swiglu_gradients", "gemm1_wgrad", "gemm2_wgrad"}),
        (("hidden_states", "logits"), {"swiglu_gradients", "gemm1_dgrad"}),
        (("logits", "hidden_states", "w1"), {"swiglu_gradients", "gemm1_dgrad", "gemm1_wgrad"}),
    ],
    ids=["all", "experts_frozen", "only_weights", "only_w2"],
)
def test_frozen_parts_cost_nothing(device, frozen, skipped):
    case, training = make_layer(device, num_tokens=40)
    recorder = Recorder(training)
    _, leaves = trained(recorder.training, case, leaves_of(case, frozen=frozen))
    assert set(recorder.names) == set(STAGES) - skipped
    assert len(recorder.names) == len(set(recorder.names))
    _, whole = trained(training, case)
    for name in NAMES:
        assert (leaves.grads[name] is None) == (name in frozen)
        assert name in frozen or torch.equal(leaves.grads[name], whole.grads[name])


def test_nothing_is_kept_where_nothing_wants_a_gradient(device):
    case, training = make_layer(device, num_tokens=40)
    recorder = Recorder(training)
    with kept_bytes() as kept:
        output = recorder.training(*leaves_of(case, frozen=NAMES))
        with torch.no_grad():
            recorder.training(*leaves_of(case))
    assert recorder.names == []
    assert kept == {}
    assert output.grad_fn is None


class kept_bytes:
    """Bytes of each storage that autograd keeps while this is open, by address."""

    def __enter__(self) -> dict[int, int]:
        self.storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.storages

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.storages.pop(0, None)  # of tensors without elements


def eager_layer(logits: Tensor, x: Tensor, w1: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """Sort, a product for each expert, SwiGLU, index_add: what is written without this package."""
    weights, ids = torch.softmax(logits, dim=1).topk(top_k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
    order = ids.flatten().argsort(stable=True)
    token = order // top_k
    counts = torch.bincount(ids.flatten(), minlength=len(w1)).tolist()
    rows = x[token]
    gate, up = torch.cat([part @ w1[e].T for e, part in enumerate(rows.split(counts))]).chunk(2, dim=1)
    act = torch.nn.functional.silu(gate) * up
    out = torch.cat([part @ w2[e].T for e, part in enumerate(act.split(counts))])
    out = out * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, out)


@pytest.mark.parametrize(("recompute", "share"), [(False, 0.30), (True, 0.02)])
def test_memory_that_is_kept_is_a_part_of_eagers(recompute, share):
    sizes = {"num_tokens": 512, "hidden_size": 512, "intermediate_size": 192, "num_experts": 16, "top_k": 4}
    case, training = make_layer("cpu", **sizes, recompute=recompute)
    leaves = leaves_of(case)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    with kept_bytes() as ours:
        training(*leaves)
    with kept_bytes() as eager:
        eager_layer(*leaves, top_k=4)
    kept, eagers = (sum(size for at, size in of.items() if at not in inputs) for of in (ours, eager))
    maps = case.permutation.max_rows * 4 * 4
    rows = case.config.permute.max_rows(512)
    gate_up = rows * 2 * 192 * 2
    assert kept <= (0 if recompute else gate_up) + maps + 512 * 4 * 16
    assert recompute or kept >= gate_up
    assert kept <= share * eagers


def test_hidden_states_are_not_kept_for_frozen_weights():
    case, training = make_layer("cpu", num_tokens=64)
    leaves = leaves_of(case, frozen=("w1", "w2"))
    with kept_bytes() as kept:
        training(*leaves)
    assert leaves.hidden_states.data_ptr() not in kept
    assert leaves.w2.data_ptr() in kept


def test_weight_gradients_are_added_to_buffers_in_float32(device):
    case, training = make_layer(device, num_tokens=200)
    _, plain = trained(training, case)
    buffers = GradBuffers(torch.zeros(case.w1.shape, device=device), torch.zeros(case.w2.shape, device=device))
    leaves = leaves_of(case)
    for _ in range(2):  # two forward passes before the first backward one, as in a pipeline of stages
        outputs = [training(*leaves, grad_buffers=buffers) for _ in range(2)]
        for output in outputs:
            output.backward(case.grad_output)
    assert leaves.w1.grad is None
    assert leaves.w2.grad is None
    for name in ("w1", "w2"):
        once = getattr(buffers, name) / 4
        assert relative_error(once, plain.grads[name]) <= 4e-3
        assert torch.equal(once.bfloat16(), plain.grads[name])
    assert leaves.hidden_states.grad is not None


def test_one_buffer_leaves_the_other_gradient_as_it_is(device):
    case, training = make_layer(device, num_tokens=40)
    _, plain = trained(training, case)
    buffers = GradBuffers(w2=torch.zeros(case.w2.shape, device=device))
    _, leaves = trained(training, case, grad_buffers=buffers)
    assert torch.equal(leaves.w1.grad, plain.w1.grad)
    assert leaves.w2.grad is None
    assert torch.equal(buffers.w2.bfloat16(), plain.w2.grad)


def test_buffers_that_gradients_cannot_be_added_to_are_refused_before_anything_runs():
    case, training = make_layer("cpu", num_tokens=7)
    shared = torch.zeros(case.w1.numel())
    weights = shared.view(torch.bfloat16)[: case.w2.numel()].view(case.w2.shape)
    whole, part = shared.view(case.w1.shape), shared[: case.w2.numel()].view(case.w2.shape)
    other = torch.zeros(case.w1.shape)
    refusals = {
        "grad_buffers: expected a GradBuffers, got dict": {"w1": whole},
        "grad_buffers: expected a GradBuffers, got tuple": (whole, None),
        "main_grad of gemm1: expected a torch.Tensor, got str": GradBuffers("main_grad"),
        r"main_grad of gemm1: expected \[": GradBuffers(part),
        "main_grad of gemm1: expected float32, got bfloat16": GradBuffers(case.w1.clone()),
        "main_grad of gemm2: expected a tensor on cpu": GradBuffers(w2=part.to("meta")),
        "main_grad of gemm2: .* shares memory with main_grad of gemm1": GradBuffers(
            other, other.flatten()[: part.numel()].view(part.shape)
        ),
        "main_grad of gemm1: .* shares memory with gemm2_weights": GradBuffers(whole),
    }
    recorder = Recorder(training)
    for message, buffers in refusals.items():
        with pytest.raises((TypeError, ValueError), match=message):
            recorder.training(logits_for(case), case.hidden_states, case.w1, weights, grad_buffers=buffers)
        with pytest.raises((TypeError, ValueError), match=message):
            recorder.training.run_experts(case.topk, case.hidden_states, case.w1, weights, grad_buffers=buffers)
    assert recorder.names == []
    assert not shared.any()
    assert not other.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(device, use_reentrant):
    case, training = make_layer(device, num_tokens=40)
    _, plain = trained(training, case)
    leaves = leaves_of(case)
    checkpoint(training, *leaves, use_reentrant=use_reentrant).backward(case.grad_output)
    assert all(torch.equal(leaves.grads[name], plain.grads[name]) for name in NAMES)


@pytest.mark.parametrize("kind", ["sum", "transposed", "sliced"])
def test_gradients_that_are_not_contiguous(device, kind):
    case, training = make_layer(device, num_tokens=40)
    leaves, whole = leaves_of(case), leaves_of(case)
    output = training(*leaves)
    if kind == "sum":
        output.sum().backward()
        grad = torch.ones_like(case.grad_output)
    elif kind == "transposed":
        output.T.contiguous().backward(case.grad_output.T.contiguous())
        grad = case.grad_output
    else:
        output[::2].backward(case.grad_output[::2])
        grad = case.grad_output.clone()
        grad[1::2] = 0
    training(*whole).backward(grad)
    assert all(torch.equal(leaves.grads[name], whole.grads[name]) for name in NAMES)


def test_gradients_add_up_over_two_backward_passes(device):
    case, training = make_layer(device, num_tokens=40)
    _, once = trained(training, case)
    _, twice = trained(training, case, trained(training, case)[1])
    for name in NAMES:
        assert torch.equal(twice.grads[name], once.grads[name] * 2)


@pytest.mark.parametrize("has_buffers", [False, True])
def test_a_second_derivative_is_refused(has_buffers):
    case, training = make_layer("cpu", num_tokens=7)
    leaves, buffers = leaves_of(case), GradBuffers(torch.zeros(case.w1.shape)) if has_buffers else None
    output = training(*leaves, grad_buffers=buffers)
    (grad,) = torch.autograd.grad(output.sum(), leaves.hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative: expected a first one"):
        grad.sum().backward()


def test_a_swapped_stage_runs_and_its_result_is_checked():
    case, training = make_layer("cpu", num_tokens=7)

    def wrong(*args: Any, **more: Any) -> Any:
        second = training.gemm2_dgrad(*args, **more)
        return second._replace(grad_weights=second.grad_weights.bfloat16())

    swapped = dataclasses.replace(training, gemm2_dgrad=wrong)
    with pytest.raises(ValueError, match=r"result of gemm2_dgrad: grad_weights: expected .*float32.* got .*bfloat16"):
        trained(swapped, case)


class Counted:
    """A stage that counts its calls."""

    def __init__(self, stage: Any) -> None:
        self.stage, self.num_calls = stage, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.num_calls += 1
        return self.stage(*arguments, **more)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
def test_a_copy_runs_its_own_stages(copied):
    case, training = make_layer("cpu", num_tokens=7)
    _, plain = trained(training, case)
    assert copied(training).key == training.key
    mine = dataclasses.replace(training, gemm1_wgrad=Counted(training.gemm1_wgrad))
    other = copied(mine)
    _, leaves = trained(other, case)
    assert torch.equal(leaves.w1.grad, plain.w1.grad)
    assert (mine.gemm1_wgrad.num_calls, other.gemm1_wgrad.num_calls) == (0, 1)


def test_a_forward_with_a_stage_of_somebody_elses_runs_it():
    case, training = make_layer("cpu", num_tokens=40)
    calls = []

    def mine(*args: Any, **more: Any) -> Tensor:
        calls.append("gemm1")
        return training.forward.gemm1(*args, **more)

    swapped = dataclasses.replace(training, forward=dataclasses.replace(training.forward, gemm1=mine))
    output, leaves = trained(swapped, case)
    wanted, plain = trained(training, case)
    assert calls == ["gemm1"]
    assert torch.equal(output, wanted)
    assert all(torch.equal(leaves.grads[name], plain.grads[name]) for name in NAMES)


def test_the_same_arguments_give_the_same_pipeline_and_replacing_nothing_keeps_its_key():
    case, training = make_layer("cpu")
    assert moe.build_training_pipeline(case.config, "cpu") is training
    assert dataclasses.replace(training).key == training.key
    assert dataclasses.replace(training, recompute=True).key != training.key


@pytest.mark.parametrize("is_tuned", [False, True])
def test_forward_may_run_by_the_tuning_tables(device, is_tuned):
    case, training = make_layer(device, num_tokens=33, is_tuned=is_tuned)
    _, leaves = trained(training, case)
    assert all(grad is not None for grad in leaves.grads.values())


def test_tensors_that_do_not_fit_are_refused_before_anything_runs():
    case, training = make_layer("cpu")
    recorder = Recorder(training)
    leaves = leaves_of(case)
    with pytest.raises(ValueError, match="gemm1_weights: expected bfloat16, got float32"):
        recorder.training(leaves.logits, leaves.hidden_states, leaves.w1.float(), leaves.w2)
    with pytest.raises(ValueError, match="hidden_states must be bfloat16"):
        recorder.training.run_experts(case.topk, leaves.hidden_states.float(), leaves.w1, leaves.w2)
    with pytest.raises(ValueError, match="main_grad of gemm1: expected float32, got bfloat16"):
        trained(training, case, grad_buffers=GradBuffers(case.w1.clone()))
    assert recorder.names == []


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("added", "add it to the result in torch"),
        ("w1_bias", "experts with biases train"),
        ("w2_bias", "experts with biases train"),
        ("output", "copy the result"),
        ("workspace", "leave it out: what is kept"),
        ("swiglu_params", "leave it out$"),
    ],
)
def test_what_a_training_call_does_not_take_is_refused_in_words_before_anything_runs(name, cure):
    case, training = make_layer("cpu", num_tokens=7)
    recorder = Recorder(training)
    more: Any = {name: torch.zeros_like(case.hidden_states)}
    logits, *others = leaves_of(case)
    calls = (
        lambda: recorder.training(logits, *others, **more),
        lambda: recorder.training.replay(logits, case.topk.expert_ids, *others, **more),
        lambda: recorder.training.run_experts(case.topk, *others, **more),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"^{name}: expected .*swiglu.* or grad_buffers beside .*; {cure}"):
            call()
    assert recorder.names == []


def test_tensors_without_memory_that_do_not_fit_are_refused_too():
    case, training = make_layer("cpu", num_tokens=7)
    logits, x, w1, w2 = (tensor.to("meta") for tensor in leaves_of(case))
    topk = TopK(case.topk.expert_ids.to("meta"), case.topk.weights.to("meta"))
    assert training(logits, x, w1, w2).shape == x.shape
    assert training.run_experts(topk, x, w1, w2).shape == x.shape
    wrong: Any = [1.702]
    with pytest.raises(ValueError, match=r"gemm1_weights: expected \[.*; pass a tensor of that shape"):
        training(logits, x, w1[:1], w2)
    with pytest.raises(ValueError, match=r"gemm2_weights: expected torch\.bfloat16 on meta, got torch\.float32"):
        training.run_experts(topk, x, w1, w2.float())
    with pytest.raises(TypeError, match="swiglu: expected a SwigluParams, got list"):
        training(logits, x, w1, w2, swiglu=wrong)
    with pytest.raises(TypeError, match="grad_buffers: expected a GradBuffers, got list"):
        training(logits, x, w1, w2, grad_buffers=wrong)


@pytest.mark.parametrize("spoilt", [lambda logits: logits.T.contiguous().T, lambda logits: logits[:, 1:].contiguous()])
def test_the_operator_that_routes_looks_at_its_logits(spoilt):
    case, training = make_layer("cpu", num_tokens=7)
    launched = []

    def launch(*args: Any, **more: Any) -> TopK:
        launched.append(args)
        return case.topk

    router = CheckedStage(training.forward.route, launch, case.config.routing)
    mine = dataclasses.replace(training, forward=dataclasses.replace(training.forward, route=router))
    with pytest.raises(ValueError, match="routing_logits: expected"):
        torch.ops.moe.training_route(spoilt(logits_for(case)), None, mine.key)
    assert not launched


def test_a_gradient_that_begins_anywhere_is_moved_to_where_kernels_read_it(monkeypatch):
    case, training = make_layer("cpu", num_tokens=7)
    wanted, _ = trained(training, case)
    _, plain = trained(training, case)
    monkeypatch.setattr(checks, "DEVICES_OF_KERNELS", ("cpu",))
    seen = []

    def gemm2_dgrad(grad_output: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(grad_output.data_ptr() % 16)
        return training.gemm2_dgrad(grad_output, *args, **more)

    leaves = leaves_of(case)
    output = dataclasses.replace(training, gemm2_dgrad=gemm2_dgrad)(*leaves, swiglu=case.swiglu)
    memory = torch.zeros(case.grad_output.numel() + 3, dtype=torch.bfloat16)
    memory[3:] = case.grad_output.flatten()
    output.backward(memory[3:].view(case.grad_output.shape))
    assert torch.equal(output, wanted)
    assert seen == [0]
    assert all(torch.equal(leaves.grads[name], plain.grads[name]) for name in NAMES)


def test_configs_without_gradients_are_refused_in_words():
    config = moe.MoEConfig.create(
        hidden_size=64, intermediate_size=64, num_experts=4, top_k=2, weight_format=moe.FLASHINFER
    )
    with pytest.raises(ValueError, match=r"gemm1\.weight_format: expected MajorK or MajorMn .* convert by"):
        moe.build_training_pipeline(config, "cpu")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 4, "top_k": 1}
    refusals = {
        "expected gate_up_order 'gate_up' or 'up_gate', got 'interleaved'": {
            "weight_format": WeightFormat(gate_up_order="interleaved")
        },
        'weight_on: expected "output", got "input"': {"weight_on": "input"},
        "has_biases: expected False, got True": {"has_biases": True},
        "activation: expected Swiglu or Relu2, got Geglu": {"activation": "Geglu"},
    }
    for words, more in refusals.items():
        with pytest.raises(ValueError, match=words):
            moe.build_training_pipeline(moe.MoEConfig.create(**sizes, **more), "cpu")
    with pytest.raises(TypeError, match="config: expected a MoEConfig, got dict"):
        moe.build_training_pipeline({}, "cpu")


def test_inference_pipelines_refuse_gradients_and_name_the_way_out():
    case, training = make_layer("cpu")
    with pytest.raises(ValueError, match=r"the layer is forward only: .*moe\.build_training_pipeline"):
        training.forward(*leaves_of(case))


def test_captured_in_a_cuda_graph(cuda):
    case, training = make_layer(cuda, num_tokens=64)
    leaves = leaves_of(case)
    _, plain = trained(training, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            grads = torch.autograd.grad(training(*leaves), leaves, case.grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(training(*leaves), leaves, case.grad_output)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(grad, plain.grads[name]) for name, grad in zip(NAMES, grads))


def test_logits_and_weights_may_be_bfloat16(device):
    case, training = make_layer(device, num_tokens=33)
    logits = logits_for(case).bfloat16().requires_grad_()
    training(logits, *leaves_of(case)[1:]).backward(case.grad_output)
    assert logits.grad.dtype == torch.bfloat16
    weights = case.topk.weights.bfloat16().requires_grad_()
    training.run_experts(TopK(case.topk.expert_ids, weights), *leaves_of(case)[1:]).backward(case.grad_output)
    assert weights.grad.dtype == torch.bfloat16
