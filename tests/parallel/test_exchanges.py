"""Every exchange over simulated ranks gives the layer's result, whatever lies where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from parallel.layers import (
    CONFIG,
    EXPERTS,
    TOP_K,
    Whole,
    layer_over,
    make_exact_whole,
    make_whole,
    run_rank,
    run_rank_with_all_tokens,
)
from torch import Tensor

import moe
from moe.flow import SwigluParams, TopK
from moe.parallel import Placement, build_layer, even_placement
from moe.parallel.simulated import simulate
from moe.parallel.transport import Transport, alone

PLACEMENTS = {
    "even": None,
    "uneven": [3, 1, 4],
    "a_rank_without_experts": [5, 0, 3],
    "scattered": [[7, 0, 3], [2], [1, 6, 5, 4]],
    "copies": Placement(EXPERTS, ((0, 1, 2, 7), (3, 4, 5, 0), (6, 7, 0, 3))),
    "all_on_the_last": [0, 0, 8],
}
TOKENS = {"equal": (5, 5, 5), "unequal": (7, 0, 4), "one_token": (0, 1, 0), "none": (0, 0, 0)}
OPTIONS = {
    "gather": {"exchange": "gather"},
    "gather_padded": {"exchange": "gather", "max_tokens": 9},
    "move": {"exchange": "move"},
    "move_rank_invariant": {"exchange": "move", "is_rank_invariant": True},
}


def outputs_of(whole: Whole, **options: object) -> Tensor:
    """The results of all ranks, one after another."""
    num_ranks = len(whole.tokens_of_rank)
    return torch.cat(simulate(num_ranks, lambda t: run_rank(whole, layer_over(t, whole, **options))))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_rank_gets_its_tokens_results(options, placement, tokens, poisoned_memory):
    whole = make_whole(tokens)
    whole.expect(outputs_of(whole, experts_of_rank=placement, **options))


@pytest.mark.parametrize("num_tokens", [1, 3, 10, 0])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_sum_gives_all_ranks_all_results(placement, num_tokens, poisoned_memory):
    whole = make_whole([num_tokens])
    build = partial(layer_over, whole=whole, exchange="sum", experts_of_rank=placement)
    outputs = simulate(3, lambda t: run_rank_with_all_tokens(whole, build(t)))
    whole.expect(outputs[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("exchange", ["local", "sum", "gather", "move"])
def test_one_rank_has_the_bits_of_the_pipeline(exchange):
    whole = make_whole([6])
    layer = build_layer(CONFIG, None, "cpu", exchange=exchange)
    output = layer.run_experts(whole.topk, whole.hidden_states, whole.w1, whole.w2)
    assert torch.equal(output, whole.reference())


@pytest.mark.parametrize("placement", [None, [1, 0, 5, 2], [[6, 2], [0, 7], [5, 1], [3, 4]], even_placement(8, 4, 8)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rank_invariant_layers_have_the_bits_of_one_rank(num_ranks, placement):
    tokens = {1: (11,), 2: (0, 11), 4: (3, 1, 0, 7)}[num_ranks]
    whole = make_exact_whole(tokens)
    placement = placement if num_ranks == 4 else None
    output = outputs_of(whole, exchange="move", is_rank_invariant=True, experts_of_rank=placement)
    assert torch.equal(output, whole.reference())


def test_partial_sums_are_joined_in_float32_in_rank_order():
    # Partials 256, 1 and 1 of three ranks: bfloat16 holds 258, but would lose each one on its way there.
    config = moe.MoEConfig.create(hidden_size=8, intermediate_size=8, num_experts=3, top_k=3, activation="Relu2")
    w1, w2 = torch.eye(8).bfloat16()[None].repeat(3, 1, 1), torch.eye(8).bfloat16()[None].repeat(3, 1, 1)
    topk = TopK(torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[256.0, 1.0, 1.0]]))
    x = torch.ones(1, 8).bfloat16()
    for exchange in ("sum", "gather", "move"):

        def one_rank(transport: Transport, exchange: str = exchange) -> Tensor:
            layer = build_layer(config, transport, "cpu", exchange=exchange)
            local = list(layer.local_experts)
            return layer.run_experts(topk, x, w1[local], w2[local])

        assert [output.tolist() for output in simulate(3, one_rank)] == [[[258.0] * 8]] * 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_call_has_the_same_bits(options):
    whole = make_whole((6, 2, 5))
    first, second = (outputs_of(whole, **options) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unused_slots_and_a_crowded_expert(options):
    whole = make_whole((6, 3, 4))
    ids = whole.topk.expert_ids.clone()
    ids[:, 0] = 2
    ids[ids == 5] = -1
    ids[0] = -1
    ids[7, 1] = EXPERTS  # no expert's
    crowded = replace(whole, topk=TopK(ids, whole.topk.weights.float()))
    output = outputs_of(crowded, **options)
    crowded.expect(output)
    assert not output[0].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_is_called_as_a_pipeline_is(options):
    generator = torch.Generator().manual_seed(3)
    whole = make_whole((4, 2))
    logits = torch.randn(6, EXPERTS, generator=generator)
    replay = torch.zeros(6, TOP_K, dtype=torch.int16)
    wanted = moe.reference_pipeline(CONFIG)(logits, whole.hidden_states, whole.w1, whole.w2, routing_replay_out=replay)

    def one_rank(transport: Transport) -> tuple[Tensor, Tensor]:
        layer = layer_over(transport, whole, **options)
        first = sum(whole.tokens_of_rank[: transport.rank])
        mine = slice(first, first + whole.tokens_of_rank[transport.rank])
        output = torch.full((whole.tokens_of_rank[transport.rank], CONFIG.hidden_size), float("nan")).bfloat16()
        chosen = torch.zeros(len(output), TOP_K, dtype=torch.int16)
        result = layer(
            logits[mine], whole.hidden_states[mine].contiguous(), *whole.weights_of(layer), output=output,
            routing_replay_out=chosen,
        )  # fmt: skip
        assert result.data_ptr() == output.data_ptr()
        return output, chosen

    results = simulate(2, one_rank)
    torch.testing.assert_close(torch.cat([output for output, _ in results]), wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(torch.cat([chosen for _, chosen in results]), replay)


@pytest.mark.parametrize("is_rank_invariant", [False, True], ids=["sums", "slots"])
def test_move_sends_a_row_once_to_each_rank_that_needs_it(is_rank_invariant):
    whole = make_whole((9, 0, 5))
    counted: dict[str, int] = {"hidden_states": 0, "results": 0}

    def counting(transport: Transport) -> Callable[..., Tensor]:
        def all_to_all(what: str, rows: Tensor, *splits: object) -> Tensor:
            if what in counted:
                counted[what] += len(rows)
            return transport.all_to_all(what, rows, *splits)

        return all_to_all

    def one_rank(transport: Transport) -> Tensor:
        spied = replace(transport, all_to_all=counting(transport))
        build = partial(
            layer_over, spied, whole, exchange="move", experts_of_rank=[3, 3, 2], is_rank_invariant=is_rank_invariant
        )
        return run_rank(whole, build())

    simulate(3, one_rank)
    rank_of_expert = [0, 0, 0, 1, 1, 1, 2, 2]
    pairs = sum(len({rank_of_expert[expert] for expert in ids}) for ids in whole.topk.expert_ids.tolist())
    slots = whole.topk.expert_ids.numel()
    assert counted == {"hidden_states": pairs, "results": slots if is_rank_invariant else pairs}


def test_loads_are_counted_by_expert():
    whole = make_whole((5, 3))
    ids = whole.topk.expert_ids.clone()
    ids[0] = -1

    def one_rank(transport: Transport) -> Tensor:
        layer = layer_over(transport, whole, counts_load=True)
        topk, hidden_states = replace(whole, topk=TopK(ids, whole.topk.weights)).tokens_at(transport.rank)
        for _ in range(2):
            layer.run_experts(topk, hidden_states, *whole.weights_of(layer))
        assert layer.load is not None
        return layer.load

    load = torch.stack(simulate(2, one_rank)).sum(0)
    assert load.tolist() == (2 * torch.bincount(ids[ids >= 0].long(), minlength=EXPERTS)).tolist()


def test_wrong_arguments_are_named():
    build = partial(build_layer, CONFIG, None, "cpu")
    for options, message in (
        ({"exchange": "teleport"}, "exchange: expected one of local, sum"),
        ({"exchange": "gather", "is_rank_invariant": True}, "is_rank_invariant: expected exchange 'move'"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
        ({"experts_of_rank": [4, 4]}, "expected 8 experts on 1 ranks, got 8 on 2"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(ValueError, match="expected one rank for 'local', got 2"):
        simulate(2, lambda transport: build_layer(CONFIG, transport, "cpu", exchange="local"))
    slice_of_it = moe.MoEConfig.create(
        hidden_size=32, intermediate_size=24, num_experts=8, top_k=2, num_local_experts=4
    )
    with pytest.raises(ValueError, match="expected all 8 experts, got a slice of 4"):
        build_layer(slice_of_it, None, "cpu")
    with pytest.raises(TypeError, match="expected a ProcessGroup"):
        build_layer(CONFIG, "world", "cpu")


def test_wrong_tensors_are_refused_before_anything_is_sent():
    whole = make_whole([4])
    layer = build_layer(CONFIG, None, "cpu", max_tokens=3)
    with pytest.raises(ValueError, match="expected at most max_tokens=3 tokens, got 4"):
        layer.run_experts(whole.topk, whole.hidden_states, whole.w1, whole.w2)
    with pytest.raises(ValueError, match="gemm1_weights"):
        layer.run_experts(whole.topk, whole.hidden_states, whole.w1[:4], whole.w2)
    with pytest.raises(ValueError, match="hidden_states: expected"):
        layer.run_experts(whole.topk, whole.hidden_states[:2], whole.w1, whole.w2)


@pytest.mark.parametrize("has_experts", [True, False])
def test_what_a_pipeline_refuses_is_refused_before_anything_is_sent(has_experts: bool):
    whole = make_whole([4])
    sent = []

    def send(what: str, tensor: Tensor) -> Tensor:
        sent.append(what)
        return torch.cat([tensor, tensor])

    transport = replace(alone(), num_ranks=2, all_gather=send)
    layer = build_layer(CONFIG, transport, "cpu", experts_of_rank=[8, 0] if has_experts else [0, 8])
    weights = whole.weights_of(layer)
    logits, tokens = torch.randn(4, 8), whole.hidden_states
    as_numbers = tokens.view(torch.int16).view(-1)[: 4 * TOP_K].view(4, TOP_K)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((None, tokens, *weights), {}, TypeError, "routing_logits: expected a torch.Tensor"),
        ((logits, tokens.clone().requires_grad_(), *weights), {}, ValueError, "hidden_states: .* needs no gradient"),
        (
            (logits, tokens, *weights),
            {"routing_replay_out": as_numbers},
            ValueError,
            "shares memory with hidden_states",
        ),
    ]
    if has_experts:
        for swiglu, error, message in (
            (SwigluParams(torch.ones(9)), ValueError, r"gemm1_alpha: expected \[E_local=8\], got \[9\]"),
            (3, TypeError, "swiglu: expected a SwigluParams"),
        ):
            cases.append(((logits, tokens, *weights), {"swiglu": swiglu}, error, message))
        output = whole.w2.view(-1)[: tokens.numel()].view(tokens.shape)
        cases.append(
            ((logits, tokens, whole.w1, whole.w2), {"output": output}, ValueError, "memory with gemm2_weights")
        )
    for tensors, more, error, message in cases:
        with pytest.raises(error, match=message):
            layer(*tensors, **more)
        assert not sent
    layer.dispatch(tokens, whole.topk)
    assert sent


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"exchange": "sum"}], ids=[*OPTIONS, "sum"])
def test_weights_that_go_into_the_input_weigh_no_result(options, placement, poisoned_memory):
    tokens = (5, 0, 4)
    whole = make_whole(tokens)
    whole = replace(whole, config=whole.config.model_copy(update={"weight_on": "input"}))
    run, has_all = (run_rank_with_all_tokens, True) if options["exchange"] == "sum" else (run_rank, False)
    outputs = simulate(3, lambda t: run(whole, layer_over(t, whole, experts_of_rank=placement, **options)))
    expected = whole.reference()
    assert not torch.allclose(expected, replace(whole, config=CONFIG).reference(), atol=1e-2)
    for output in outputs if has_all else [torch.cat(outputs)]:
        torch.testing.assert_close(output, expected, rtol=2**-6, atol=2e-2)


@pytest.mark.parametrize("gate", ["none", "number", "tensor"])
@pytest.mark.parametrize("exchange", ["gather", "move", "sum"])
def test_what_is_added_counts_once_however_many_ranks_there_are(exchange, gate, poisoned_memory):
    tokens = (5, 0, 4)
    whole = make_whole(tokens)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(whole.hidden_states.shape, generator=generator).bfloat16()
    numbers = torch.rand(len(values), generator=generator)
    first_of = [0, 5, 5, 9]

    def run(transport: Transport) -> Tensor:
        layer, rank = layer_over(transport, whole, exchange=exchange, experts_of_rank=[5, 0, 3]), transport.rank
        has_all = exchange == "sum"
        part = slice(None) if has_all else slice(first_of[rank], first_of[rank + 1])
        of_name = {"none": None, "number": 0.5, "tensor": numbers[part].clone()}
        added = moe.Added(values[part].clone(), of_name[gate])
        topk, hidden_states = (whole.topk, whole.hidden_states) if has_all else whole.tokens_at(rank)
        arguments = (topk, hidden_states, *whole.weights_of(layer))
        result = layer.run_experts(*arguments, added=added)
        without = layer.run_experts(*arguments)
        scale = {"none": 1.0, "number": 0.5}.get(gate, numbers[part][:, None])
        assert torch.equal(result, (without.float() + scale * added.values.float()).bfloat16())
        return result

    outputs = simulate(3, run)
    assert sum(map(len, outputs)) == len(values) * (3 if exchange == "sum" else 1)
