"""Random layers under autograd, each gradient against float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gemm.backward.cases import exact_gradients
from training.layers import NAMES, leaves_of, make_layer

import moe
from moe.flow import SwigluParams, TopK
from moe.gemm.config import WeightFormat
from moe.testing.closeness import relative_error

NUM_LAYERS = 40


def random_layer(seed: int) -> dict[str, Any]:
    """The arguments of `make_layer`."""
    draw = random.Random(seed)
    num_experts = draw.choice([1, 2, 5, 9, 33])
    top_k = draw.randint(1, min(num_experts, 6))
    num_local = draw.randint(1, num_experts)
    num_tokens = draw.choice([0, 1, 2, 7, 16, 17, 50, 130])
    layer: dict[str, Any] = {
        "num_tokens": num_tokens,
        "hidden_size": 8 * draw.randint(1, 9),
        "intermediate_size": 8 * draw.randint(1, 9),
        "num_experts": num_experts,
        "top_k": top_k,
        "num_local_experts": num_local,
        "local_expert_offset": draw.randint(0, num_experts - num_local),
        "tile_rows": draw.choice([None, 16, 64, 128]),
        "activation": draw.choice(["Swiglu", "Swiglu", "Relu2"]),
        "weight_format": WeightFormat(
            layout=draw.choice(["MajorK", "MajorMn"]), gate_up_order=draw.choice(["gate_up", "up_gate"])
        ),
        "weight_dtype": draw.choice([torch.float32, torch.bfloat16]),
        "recompute": draw.random() < 0.3,
        "seed": seed,
    }
    if layer["activation"] == "Swiglu" and draw.random() < 0.4:
        values = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 0.701171875}
        chosen = {name: value for name, value in values.items() if draw.random() < 0.6}
        layer["swiglu"] = SwigluParams(**{name: torch.full((num_local,), value) for name, value in chosen.items()})
    if draw.random() < 0.3:  # all to few experts, and ids of nobody
        layer["expert_ids"] = torch.tensor(
            [[draw.choice([-1, 0, num_experts - 1, num_experts]) for _ in range(top_k)] for _ in range(num_tokens)],
            dtype=torch.int32,
        ).view(num_tokens, top_k)
    return layer


def moved(layer: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if (swiglu := layer.get("swiglu")) is None:
        return layer
    tensors = {name: value.to(device) for name, value in vars(swiglu).items() if value is not None}
    return layer | {"swiglu": SwigluParams(**tensors)}


@pytest.mark.parametrize("seed", range(NUM_LAYERS))
def test_gradients_are_near_those_of_float64_and_frozen_ones_are_none(device, poisoned_memory, seed):
    draw = random.Random(-seed)
    case, training = make_layer(device, **moved(random_layer(seed), device))
    frozen = tuple(name for name in NAMES[1:] if draw.random() < 0.2)
    leaves, weights = leaves_of(case, frozen=frozen), case.topk.weights.clone().requires_grad_()
    buffers = None
    if draw.random() < 0.3:
        buffers = moe.GradBuffers(w1=torch.zeros(case.w1.shape, device=device))
    topk = TopK(case.topk.expert_ids, weights)
    output = training.run_experts(topk, *leaves[1:], swiglu=case.swiglu, grad_buffers=buffers)
    output.backward(case.grad_output)
    tensors = [tensor.detach() for tensor in leaves[1:]]
    inference = training.forward.run_experts(TopK(topk.expert_ids, weights.detach()), *tensors, swiglu=case.swiglu)
    assert torch.equal(output, inference)
    exact = exact_gradients(case)
    for name in NAMES[1:]:
        grad = leaves.grads[name]
        if name == "w1" and buffers is not None and name not in frozen:
            assert grad is None
            grad = buffers.w1
        assert (grad is None) == (name in frozen), name
        if grad is not None:
            assert relative_error(grad, getattr(exact, name)) <= 1e-2, name
            assert bool((grad[getattr(exact, name) == 0] == 0).all()), name
    if (exact.weights != 0).sum() >= 40:  # of a few dot products each may nearly cancel
        assert relative_error(weights.grad, exact.weights) <= 1e-2
