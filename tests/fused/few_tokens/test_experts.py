"""The few-token kernels against float64 and against the chain of references that they replace."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from closeness import assert_close_to_exact, assert_rounded_once
from gemm.cases import ALL_FORMATS, format_id
from problems import experts_in_float64, make_problem
from torch import Tensor

from moe.config import MoEConfig
from moe.flow import SwigluParams, TopK
from moe.fused.few_tokens.config import (
    MAX_REREAD_BYTES,
    FewTokenConfig,
    MatvecTile,
)
from moe.fused.few_tokens.reference import (
    few_token_experts_reference,
    few_token_gemm1_reference,
    few_token_gemm2_finalize_reference,
)
from moe.gemm.config import FLASHINFER, WeightFormat, WeightLayout
from moe.gemm.reference import activate_reference
from moe.gemm.weight_format import pack_weights
from moe.pipeline import reference_pipeline

pytest.importorskip("triton")
from moe.fused.few_tokens.experts import few_token_experts
from moe.fused.few_tokens.gemm1 import few_token_gemm1
from moe.fused.few_tokens.gemm2_finalize import few_token_gemm2_finalize

FORMATS = [weight_format for weight_format in ALL_FORMATS if weight_format.layout is not WeightLayout.MajorMn]
GARBAGE_IDS = (-1, -(2**31), 2**31 - 1, 1 << 30)
WIDE = MatvecTile(block_n=64, block_k=64)  # few programs: the interpreter takes a millisecond a step


@dataclass(frozen=True)
class Case:
    """One layer's experts and tokens; weights packed as the config says, and logical."""

    layer: MoEConfig
    config: FewTokenConfig
    topk: TopK
    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    logical: tuple[Tensor, Tensor]

    def run(self, function=few_token_experts, **arguments) -> Tensor:
        return function(self.topk, self.hidden_states, self.w1, self.w2, config=self.config, **arguments)

    def exact(self, swiglu: SwigluParams | None = None) -> Tensor:
        return experts_in_float64(
            self.topk,
            self.hidden_states,
            *self.logical,
            is_gated=self.layer.gemm1.is_gated,
            local_expert_offset=self.config.local_expert_offset,
            swiglu=swiglu,
        )


def make_case(
    *,
    num_tokens: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 64,
    num_experts: int = 5,
    top_k: int = 2,
    expert_ids: Tensor | list | None = None,
    weight_dtype: torch.dtype = torch.bfloat16,
    slot_tile: MatvecTile | None = WIDE,
    token_tile: MatvecTile | None = WIDE,
    uses_pdl: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **layer: object,
) -> Case:
    """Distinct random experts a token, or those of expert_ids."""
    config = MoEConfig.create(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        **layer,
    )
    generator = torch.Generator().manual_seed(seed)
    if expert_ids is None:
        expert_ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    ids = torch.as_tensor(expert_ids).to(device=device, dtype=torch.int32).contiguous()
    problem = make_problem(config, len(ids), seed=seed, device=device)
    weights = torch.rand(ids.shape, generator=generator).add(0.1).to(device=device, dtype=weight_dtype)
    weight_format = config.gemm1.weight_format
    return Case(
        layer=config,
        config=few_token_config(config, slot_tile=slot_tile, token_tile=token_tile, uses_pdl=uses_pdl),
        topk=TopK(ids, weights),
        hidden_states=problem.hidden_states,
        w1=pack_weights(problem.w1, weight_format, is_gated=config.gemm1.is_gated),
        w2=pack_weights(problem.w2, weight_format, is_gated=False),
        logical=(problem.w1, problem.w2),
    )


def few_token_config(config: MoEConfig, **more: object) -> FewTokenConfig:
    return FewTokenConfig(
        num_experts=config.num_experts,
        top_k=config.top_k,
        gemm1=config.gemm1,
        gemm2=config.gemm2,
        local_expert_offset=config.permute.local_expert_offset,
        **more,
    )


def assert_kernels_are_close(case: Case, swiglu: SwigluParams | None = None) -> None:
    reference = case.run(few_token_experts_reference, swiglu=swiglu)
    assert_close_to_exact(case.run(swiglu=swiglu), reference, case.exact(swiglu))


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_every_weight_format_is_read(triton_device, poisoned_memory, activation, weight_format):
    case = make_case(
        hidden_size=192,
        intermediate_size=128,
        activation=activation,
        weight_format=weight_format,
        device=triton_device,
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(8, 8), (40, 72), (264, 104)])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_dims_need_only_be_multiples_of_8(triton_device, poisoned_memory, hidden_size, intermediate_size, activation):
    assert_kernels_are_close(
        make_case(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            device=triton_device,
        )
    )


@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_default_tiles_give_the_layer(triton_device, poisoned_memory, num_tokens, weight_format):
    case = make_case(
        num_tokens=num_tokens, weight_format=weight_format, slot_tile=None, token_tile=None, device=triton_device
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("tile", [(1, 64), (2, 128), (8, 256)], ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_any_tile_gives_the_layer(triton_device, poisoned_memory, tile):
    tile = MatvecTile(block_n=tile[0], block_k=tile[1], num_prefetched=3)
    case = make_case(
        num_tokens=1, intermediate_size=16, slot_tile=tile, token_tile=tile, uses_pdl=True, device=triton_device
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("num_prefetched", [1, 2, 5, 32])
def test_prefetched_weights_change_no_bit(triton_device, poisoned_memory, num_prefetched):
    # 192 = 3 steps a slot and 6 in all: prefetched are part of a slot, more than a slot, and everything.
    plain = make_case(intermediate_size=192, device=triton_device)
    tile = MatvecTile(block_n=64, block_k=64, num_prefetched=num_prefetched)
    ahead = make_case(intermediate_size=192, token_tile=tile, uses_pdl=True, device=triton_device)
    assert torch.equal(ahead.run(), plain.run())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parameters", [("alpha",), ("beta",), ("clamp_limit",), ("alpha", "beta", "clamp_limit")])
def test_swiglu_parameters_go_by_local_expert(triton_device, poisoned_memory, parameters, weight_dtype):
    generator = torch.Generator().manual_seed(3)
    swiglu = SwigluParams(**{name: (torch.rand(3, generator=generator) + 0.3).to(triton_device) for name in parameters})
    case = make_case(
        num_experts=9,
        num_local_experts=3,
        local_expert_offset=4,
        expert_ids=[[4, 5], [6, 8]],
        weight_dtype=weight_dtype,
        device=triton_device,
    )
    assert_kernels_are_close(case, swiglu)


@pytest.mark.parametrize("uses_pdl", [False, True], ids=["plain", "dependent"])
@pytest.mark.parametrize(("first", "count"), [(0, 2), (3, 3), (7, 1), (0, 8)], ids=["E0-1", "E3-5", "E7", "all"])
def test_a_rank_sums_its_own_experts_and_skips_garbage_ids(triton_device, poisoned_memory, first, count, uses_pdl):
    ids = [[first, GARBAGE_IDS[0]], [GARBAGE_IDS[1], 7], [1, GARBAGE_IDS[2]], [4, 3], [GARBAGE_IDS[3], 8]]
    case = make_case(
        num_experts=8,
        num_local_experts=count,
        local_expert_offset=first,
        expert_ids=ids,
        uses_pdl=uses_pdl,
        device=triton_device,
    )
    assert_kernels_are_close(case)


@pytest.mark.parametrize("count", [2, 8], ids=["a-slice", "all-local"])
def test_tokens_without_local_experts_get_zeros(triton_device, poisoned_memory, count):
    ids = [[-1, 8], [1 << 30, -5], [0, 1]]
    case = make_case(num_experts=8, num_local_experts=count, expert_ids=ids, device=triton_device)
    out = case.run()
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert (out[2] != 0).any()


def test_an_expert_that_comes_twice_in_a_row_counts_twice(triton_device, poisoned_memory):
    once = make_case(expert_ids=[[3]], top_k=1, weight_dtype=torch.float32, device=triton_device)
    twice = make_case(expert_ids=[[3, 3]], weight_dtype=torch.float32, device=triton_device)
    once.topk.weights.fill_(1.0)
    twice.topk.weights.fill_(0.5)
    assert torch.equal(twice.run(), once.run())


def test_many_choices_run_in_a_loop(triton_device, poisoned_memory):
    # 24 slots of 3 steps are more than a program unrolls.
    case = make_case(num_tokens=1, intermediate_size=192, num_experts=30, top_k=24, device=triton_device)
    assert_kernels_are_close(case)


def test_a_token_alone_has_the_bits_that_it_has_in_a_batch(triton_device, poisoned_memory):
    case = make_case(num_tokens=7, slot_tile=None, token_tile=None, device=triton_device)
    batch = case.run()
    for token in (0, 3, 6):
        alone = slice(token, token + 1)
        topk = TopK(case.topk.expert_ids[alone].clone(), case.topk.weights[alone].clone())
        out = few_token_experts(topk, case.hidden_states[alone].clone(), case.w1, case.w2, config=case.config)
        assert torch.equal(out[0], batch[token])


def test_the_sum_is_of_rows_rounded_to_bf16(triton_device, poisoned_memory):
    # The first row is 1 + 2^-9, which bf16 rounds to 1, the second one is 1; unrounded, their difference is 2^-9.
    case = make_case(num_tokens=1, weight_dtype=torch.float32, device=triton_device)
    activation = torch.zeros(2, 64, dtype=torch.bfloat16, device=triton_device)
    activation[:, 0] = 1
    activation[0, 1] = 2**-9
    topk = TopK(case.topk.expert_ids, torch.tensor([[1.0, -1.0]], device=triton_device))
    out = few_token_gemm2_finalize(activation, torch.ones_like(case.w2), topk, config=case.config)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("function", [few_token_gemm1, few_token_gemm1_reference])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_the_activation_is_of_sums_that_were_not_rounded(triton_device, poisoned_memory, activation, function):
    case = make_case(num_tokens=5, hidden_size=192, activation=activation, device=triton_device)
    out = function(case.hidden_states, case.w1, case.topk, config=case.config)
    weights = case.logical[0][case.topk.expert_ids.long()].double()  # [T, K, 2I or I, H]
    products = (weights @ case.hidden_states.double()[:, None, :, None]).flatten(0, 1).squeeze(-1)
    assert_rounded_once(out, activate_reference(products, 0, case.config.gemm1, None))


@pytest.mark.parametrize("function", [few_token_gemm2_finalize, few_token_gemm2_finalize_reference])
@pytest.mark.parametrize("top_k", [2, 65], ids=["unrolled", "in_a_loop"])
def test_float32_weights_are_not_cut_to_bfloat16(triton_device, poisoned_memory, top_k, function):
    case = make_case(num_tokens=1, num_experts=top_k, top_k=top_k, weight_dtype=torch.float32, device=triton_device)
    case.topk.weights[0] = torch.tensor([1 + 2.0**-10, -1.0] + [0.0] * (top_k - 2))
    activation = torch.zeros(top_k, 64, dtype=torch.bfloat16, device=triton_device)
    activation[:, 0] = 1
    out = function(activation, torch.ones_like(case.w2), case.topk, config=case.config)
    assert (out == 2.0**-10).all()


@pytest.mark.parametrize("function", [few_token_gemm2_finalize, few_token_gemm2_finalize_reference])
def test_products_of_a_row_are_summed_in_float32(triton_device, poisoned_memory, function):
    # (1 + 2^-7)^2 has 15 bits; the others leave its last one.
    case = make_case(num_tokens=1, top_k=1, device=triton_device)
    case.topk.weights.fill_(1.0)
    activation, weights = (
        torch.zeros(size, dtype=torch.bfloat16, device=triton_device) for size in ((1, 64), case.w2.shape)
    )
    activation[0, :3] = weights[..., :3] = torch.tensor([1 + 2.0**-7, 1.0, 2.0**-3], device=triton_device).bfloat16()
    weights[..., 1:3] *= -1
    out = function(activation, weights, case.topk, config=case.config)
    assert (out == 2.0**-14).all()


def test_slots_are_the_rows_between_the_kernels(triton_device, poisoned_memory):
    case = make_case(num_experts=8, num_local_experts=4, expert_ids=[[0, 7], [3, 1]], device=triton_device)
    arguments = (case.hidden_states, case.w1, case.topk)
    activation = few_token_gemm1(*arguments, config=case.config)
    reference = few_token_gemm1_reference(*arguments, config=case.config)
    local = [0, 2, 3]
    assert activation.shape == (4, 64)
    torch.testing.assert_close(activation[local], reference[local], rtol=2**-7, atol=1e-3)
    out = few_token_gemm2_finalize(activation, case.w2, case.topk, config=case.config)
    assert_close_to_exact(
        out, few_token_gemm2_finalize_reference(reference, case.w2, case.topk, config=case.config), case.exact()
    )


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_the_output_goes_where_it_is_asked_for(triton_device, poisoned_memory, function):
    case = make_case(device=triton_device)
    output = torch.empty(2, 64, dtype=torch.bfloat16, device=triton_device)
    assert case.run(function, output=output) is output
    assert torch.equal(output, case.run(function))


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_an_output_allocated_in_inference_mode_is_written_outside_of_it(triton_device, poisoned_memory, function):
    case = make_case(device=triton_device)
    with torch.inference_mode():
        output = torch.empty(2, 64, dtype=torch.bfloat16, device=triton_device)
    case.run(function, output=output)
    assert torch.equal(output, case.run(function))


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_ids_alone_are_no_chosen_experts(function):
    case = make_case()
    with pytest.raises(TypeError, match=r"topk: expected a TopK, got Tensor; moe\.TopK"):
        function(case.topk.expert_ids, case.hidden_states, case.w1, case.w2, config=case.config)


def test_the_reference_follows_neither_the_default_dtype_nor_autocast():
    case = make_case(device="cpu")
    expected = case.run(few_token_experts_reference)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(case.run(few_token_experts_reference), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_no_tokens_give_an_empty_output(triton_device, function):
    case = make_case(expert_ids=torch.empty(0, 2), device=triton_device)
    out = case.run(function)
    assert (out.shape, out.dtype) == ((0, 64), torch.bfloat16)


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_the_reference_is_the_chain_that_it_replaces(poisoned_memory, activation, weight_format):
    case = make_case(
        num_tokens=7,
        hidden_size=128,
        num_experts=8,
        num_local_experts=5,
        local_expert_offset=2,
        activation=activation,
        weight_format=weight_format,
    )
    chain = reference_pipeline(case.layer)
    assert torch.equal(
        case.run(few_token_experts_reference), chain.run_experts(case.topk, case.hidden_states, case.w1, case.w2)
    )


@pytest.mark.parametrize("function", [few_token_experts, few_token_experts_reference])
def test_wrong_tensors_are_named_before_anything_is_written(function):
    case = make_case()
    output = torch.full((2, 64), 7.0, dtype=torch.bfloat16)
    arguments = {"topk": case.topk, "hidden_states": case.hidden_states, "w1": case.w1, "w2": case.w2}
    wrong = [
        ("hidden_states", {"hidden_states": case.hidden_states.float()}),
        ("gemm1_weights", {"w1": case.w1[:4]}),
        ("gemm2_weights", {"w2": case.w2.mT.contiguous()[:, :8]}),
        ("expert_ids", {"topk": TopK(case.topk.expert_ids.long(), case.topk.weights)}),
        ("expert_weights", {"topk": TopK(case.topk.expert_ids, case.topk.weights.half())}),
        ("output", {"output": case.hidden_states}),
    ]
    for name, change in wrong:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            function(**{**arguments, "output": output, **change}, config=case.config)
    assert (output == 7).all()


def test_weights_with_neighbours_along_rows_are_refused():
    with pytest.raises(ValueError, match="MajorK or BlockMajorK"):
        make_case(weight_format=WeightFormat(layout="MajorMn"))


@pytest.mark.parametrize(
    ("dims", "fastest_at", "slower_at"),
    [
        ((2048, 768, 128, 8), 8, 16),
        ((4096, 1536, 128, 8), 4, 16),
        ((2048, 1024, 64, 8), 4, 16),
        ((4096, 14336, 8, 2), 2, 4),
        ((5120, 8192, 16, 1), 4, 8),
        ((1536, 256, 128, 8), 12, 16),
        ((2688, 1856, 128, 6, "Relu2"), 8, 12),
    ],
    ids=["qwen3_30b", "qwen3_235b", "olmoe", "mixtral", "scout", "sonic_7b", "nemotron_3_nano"],
)
def test_few_tokens_end_where_an_h200_was_faster_by_grouping(dims, fastest_at, slower_at):
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k", "activation")
    layer = MoEConfig.create(**dict(zip(names, dims)))
    assert fastest_at <= few_token_config(layer).max_tokens < slower_at


@pytest.mark.parametrize("dim", [64, 200, 768, 1856])
def test_few_tokens_end_where_too_many_bytes_are_read_again(dim: int):
    layer = MoEConfig.create(hidden_size=4096, intermediate_size=dim, num_experts=128, top_k=8)
    config = few_token_config(layer)
    assert config._reread_bytes(config.max_tokens) <= MAX_REREAD_BYTES < config._reread_bytes(config.max_tokens + 1)


def test_a_slice_groups_its_tokens_earlier():
    layer = MoEConfig.create(hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8, num_local_experts=32)
    assert few_token_config(layer).max_tokens == 2


def test_a_token_alone_is_always_few():
    layer = MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=64, top_k=64, num_local_experts=32)
    assert few_token_config(layer).max_tokens == 1


LARGE = {"num_tokens": 4, "hidden_size": 2048, "intermediate_size": 768, "num_experts": 32, "top_k": 8}
DEFAULT = {"slot_tile": None, "token_tile": None}


@pytest.mark.parametrize("weight_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("local", [32, 8], ids=["all-local", "a-slice"])
@pytest.mark.parametrize("uses_pdl", [False, True], ids=["plain", "dependent"])
def test_real_dims_give_the_layer(cuda, poisoned_memory, uses_pdl, local, weight_format):
    case = make_case(
        **LARGE, **DEFAULT, num_local_experts=local, weight_format=weight_format, uses_pdl=uses_pdl, device=cuda
    )
    assert_kernels_are_close(case)
    assert torch.equal(case.run(), case.run())


def test_a_replayed_graph_reads_new_inputs(cuda):
    old, new = (make_case(**LARGE, **DEFAULT, uses_pdl=True, seed=seed, device=cuda) for seed in (1, 2))
    expected = new.run()
    old.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = old.run()
    for before, now in zip(
        (old.topk.expert_ids, old.topk.weights, old.hidden_states, old.w1, old.w2),
        (new.topk.expert_ids, new.topk.weights, new.hidden_states, new.w1, new.w2),
    ):
        before.copy_(now)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("local", [32, 8], ids=["all-local", "a-slice"])
def test_dependent_launches_race_with_nothing(cuda, local):
    """A captured chain of dependent layers, replayed over random inputs beside a noisy stream, has the plain chain's bits.

    Layers write into one another's inputs and share the activation's memory, so a kernel that reads or writes too early
    meets what another one is still using.
    """
    num_replays, num_inputs, num_layers = 10_000, 64, 4
    sizes = LARGE | {"hidden_size": 1024, "intermediate_size": 256}
    dependent = make_case(**sizes, **DEFAULT, num_local_experts=local, uses_pdl=True, device=cuda)
    plain = make_case(**sizes, **DEFAULT, num_local_experts=local, device=cuda)
    w1, w2 = plain.w1, plain.w2 * 16  # so that activations do not vanish over the layers
    num_tokens, top_k = plain.topk.expert_ids.shape
    generator = torch.Generator(device=cuda).manual_seed(0)
    scores = torch.rand(num_inputs, num_layers, num_tokens, 32, generator=generator, device=cuda)
    ids = scores.argsort(3)[..., :top_k].int().contiguous()
    hidden = torch.randn(num_inputs, num_tokens, 1024, generator=generator, device=cuda).bfloat16()

    def run(config: FewTokenConfig, ids: Tensor, buffers: list[Tensor]) -> None:
        for layer in range(num_layers):
            topk = TopK(ids[layer], plain.topk.weights)
            few_token_experts(topk, buffers[layer % 2], w1, w2, config=config, output=buffers[(layer + 1) % 2])

    buffers = [torch.empty_like(hidden[0]) for _ in range(2)]
    expected = []
    for of_input, hidden_states in zip(ids, hidden):
        buffers[0].copy_(hidden_states)
        run(plain.config, of_input, buffers)
        expected.append(buffers[num_layers % 2].clone())
    assert all(torch.isfinite(value).all() for value in expected)
    # A token of a slice that meets no local expert is zero from there on, so not every value is not.
    assert sum(bool(value.any()) for value in expected) > num_inputs // 2

    static_ids = ids[0].clone()
    run(dependent.config, static_ids, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(dependent.config, static_ids, buffers)
    noise = torch.cuda.Stream()
    busy = [torch.randn(size, size, device=cuda) for size in (64, 512, 1024)]
    num_wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    order = torch.randint(num_inputs, (num_replays,), generator=torch.Generator().manual_seed(1)).tolist()
    for replay, index in enumerate(order):
        if replay % 8 == 0:
            with torch.cuda.stream(noise):
                torch.mm(busy[index % 3], busy[index % 3])
        static_ids.copy_(ids[index])
        buffers[1].fill_(float("nan"))
        buffers[0].copy_(hidden[index])
        graph.replay()
        num_wrong += (buffers[num_layers % 2] != expected[index]).any()
    assert num_wrong.item() == 0
