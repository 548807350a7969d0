"""The Hopper GEMMs on a Hopper, against the reference and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from closeness import assert_close_to_exact
from gemm.hopper_cases import permutation_of_counts, real_rows
from torch import Tensor

from moe.flow import Permutation, SwigluParams
from moe.gemm.config import FLASHINFER, ActivationType, GemmConfig, WeightFormat, WeightLayout
from moe.gemm.hopper.problem import WIDE_UNITS
from moe.gemm.hopper.work_units import plan_units, units_of
from moe.gemm.reference import activate_reference, gather_gemm_reference, grouped_gemm_reference, rows_of_experts
from moe.gemm.swapped.gemm1 import swapped_gemm1
from moe.gemm.swapped.gemm2 import swapped_gemm2
from moe.gemm.swapped.tile import SWAPPED_UNITS
from moe.gemm.weight_format import pack_weights
from moe.gemm.wide.gemm1 import wide_gemm1
from moe.gemm.wide.gemm2 import wide_gemm2

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMATS = {
    "huggingface": WeightFormat(),
    "flashinfer": FLASHINFER,
    "up_gate": WeightFormat(gate_up_order="up_gate"),
    "shuffled_MajorK": WeightFormat(is_shuffled=True),
    "BlockMajorK": WeightFormat(layout=WeightLayout.BlockMajorK),
}
COUNTS = {
    "edges_of_tiles": [1, 63, 64, 65, 0, 127, 128, 129, 193],
    "edges_of_branches": [15, 16, 17, 31, 32, 33, 0, 95, 96, 97, 159, 160, 161, 319, 320, 321],
    "one_expert_takes_all": [0, 0, 3001, 0],
    "many_units": [700, 333, 0, 1290, 5],
    "nobody": [0, 0],
}
NUM_TOKENS = 517


@dataclass(frozen=True)
class Kernels:
    """A pair of GEMMs, and the tile_rows to call them with."""

    gather: Callable[..., Tensor]
    grouped: Callable[..., Tensor]
    tile_rows: int


KERNELS = {f"wide-tile_rows{rows}": Kernels(wide_gemm1, wide_gemm2, rows) for rows in (64, 128)} | {
    f"swapped-tile_rows{rows}": Kernels(swapped_gemm1, swapped_gemm2, rows) for rows in (16, 32, 64, 128)
}
for_all_kernels = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
for_both_kernels = pytest.mark.parametrize(
    "kernels",
    [KERNELS["wide-tile_rows128"], KERNELS["swapped-tile_rows128"], KERNELS["swapped-tile_rows16"]],
    ids=["wide", "swapped", "swapped16"],
)


@dataclass(frozen=True)
class Dims:
    in_features: int
    out_features: int


ALIGNED = [Dims(256, 128), Dims(128, 320), Dims(1024, 768), Dims(4160, 256)]
AWKWARD = [Dims(72, 8), Dims(200, 104), Dims(264, 136), Dims(136, 520)]  # MajorK only, not shuffled


@pytest.fixture
def hopper(cuda) -> torch.device:
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("not a Hopper")
    return cuda


def normal(*shape: int, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()


def gemm_config(dims: Dims, counts: list[int], weight_format: WeightFormat, *, is_gated: bool) -> GemmConfig:
    return GemmConfig(
        num_experts=len(counts),
        in_features=dims.in_features,
        out_features=dims.out_features,
        activation=ActivationType.Swiglu if is_gated else None,
        weight_format=weight_format,
    )


def logical_weights(config: GemmConfig, device: torch.device) -> Tensor:
    shape = (config.num_experts, config.weight_rows, config.in_features)
    return normal(*shape, device=device, seed=1, scale=config.in_features**-0.5)


def product_in_float64(
    rows: Tensor, logical: Tensor, permutation: Permutation, config: GemmConfig, swiglu=None
) -> Tensor:
    exact = torch.zeros(len(rows), config.out_features, dtype=torch.float64, device=rows.device)
    for expert, its_rows in rows_of_experts(permutation):
        product = rows[its_rows].double() @ logical[expert].double().T
        exact[its_rows] = activate_reference(product, expert, config, swiglu) if config.is_gated else product
    return exact


def check_gather(kernels, dims, counts, weight_format, device, *, is_dynamic=True, swiglu=None):
    config = gemm_config(dims, counts, weight_format, is_gated=True)
    permutation = permutation_of_counts(counts, kernels.tile_rows, NUM_TOKENS, device=device)
    logical = logical_weights(config, device)
    weights = pack_weights(logical, weight_format, is_gated=True)
    hidden_states = normal(NUM_TOKENS, dims.in_features, device=device, seed=2)
    actual = kernels.gather(hidden_states, weights, permutation, config=config, swiglu=swiglu, is_dynamic=is_dynamic)
    reference = gather_gemm_reference(hidden_states, weights, permutation, config=config, swiglu=swiglu)
    rows = hidden_states[permutation.token_of_row.clamp(min=0)]
    exact = product_in_float64(rows, logical, permutation, config, swiglu)
    is_real = real_rows(permutation)
    assert_close_to_exact(actual[is_real], reference[is_real], exact[is_real])


def check_grouped(kernels, dims, counts, weight_format, device, *, is_dynamic=True):
    config = gemm_config(dims, counts, weight_format, is_gated=False)
    permutation = permutation_of_counts(counts, kernels.tile_rows, NUM_TOKENS, device=device)
    logical = logical_weights(config, device)
    weights = pack_weights(logical, weight_format, is_gated=False)
    is_real = real_rows(permutation)
    rows = normal(permutation.max_rows, dims.in_features, device=device, seed=3)
    rows[~is_real] = float("nan")
    actual = kernels.grouped(rows, weights, permutation, config=config, is_dynamic=is_dynamic)
    reference = grouped_gemm_reference(rows, weights, permutation, config=config)
    exact = product_in_float64(rows, logical, permutation, config)
    assert_close_to_exact(actual[is_real], reference[is_real], exact[is_real])


@for_all_kernels
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dims", ALIGNED, ids=str)
def test_every_format_is_multiplied_where_it_lies(hopper, kernels, dims, weight_format):
    check_gather(kernels, dims, COUNTS["edges_of_tiles"], weight_format, hopper)
    check_grouped(kernels, dims, COUNTS["edges_of_tiles"], weight_format, hopper)


@for_both_kernels
@pytest.mark.parametrize("dims", AWKWARD, ids=str)
def test_dims_that_are_no_multiple_of_a_tile(hopper, kernels, dims):
    check_gather(kernels, dims, COUNTS["edges_of_tiles"], WeightFormat(), hopper)
    check_grouped(kernels, dims, COUNTS["edges_of_tiles"], WeightFormat(), hopper)


@pytest.mark.parametrize("is_dynamic", [True, False], ids=["dynamic", "static"])
@for_all_kernels
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_loads_of_every_kind(hopper, kernels, counts, is_dynamic):
    if not any(counts):
        config = gemm_config(Dims(256, 256), counts, WeightFormat(), is_gated=False)
        permutation = permutation_of_counts(counts, kernels.tile_rows, NUM_TOKENS, device=hopper)
        rows = normal(permutation.max_rows, 256, device=hopper, seed=3)
        out = kernels.grouped(rows, logical_weights(config, hopper), permutation, config=config)
        assert out.isnan().all(), "nothing is written"
        return
    for weight_format in (WeightFormat(), FLASHINFER):
        check_gather(kernels, Dims(512, 768), counts, weight_format, hopper, is_dynamic=is_dynamic)
        check_grouped(kernels, Dims(768, 512), counts, weight_format, hopper, is_dynamic=is_dynamic)


@for_both_kernels
@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=["huggingface", "flashinfer"])
@pytest.mark.parametrize("given", ["alpha", "beta", "clamp_limit", "all"])
def test_swiglu_parameters_of_each_expert(hopper, kernels, given, weight_format):
    counts = COUNTS["many_units"]
    experts = torch.arange(len(counts), device=hopper)
    values = {"alpha": 1.0 + 0.3 * experts, "beta": 0.5 * experts - 1, "clamp_limit": 0.4 + 0.1 * experts}
    swiglu = SwigluParams(**{name: value for name, value in values.items() if given in (name, "all")})
    check_gather(kernels, Dims(256, 256), counts, weight_format, hopper, swiglu=swiglu)


@for_both_kernels
@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=["huggingface", "flashinfer"])
def test_bits_are_the_same_in_20_runs_and_in_a_replayed_graph(hopper, kernels, weight_format):
    counts, dims = COUNTS["many_units"] * 4, Dims(512, 512)
    permutation = permutation_of_counts(counts, kernels.tile_rows, NUM_TOKENS, device=hopper)
    gate = gemm_config(dims, counts, weight_format, is_gated=True)
    down = gemm_config(dims, counts, weight_format, is_gated=False)
    w1 = pack_weights(logical_weights(gate, hopper), weight_format, is_gated=True)
    w2 = pack_weights(logical_weights(down, hopper), weight_format, is_gated=False)
    hidden_states = normal(NUM_TOKENS, 512, device=hopper, seed=2)
    is_real = real_rows(permutation)

    def both() -> Tensor:
        return kernels.grouped(
            kernels.gather(hidden_states, w1, permutation, config=gate), w2, permutation, config=down
        )

    first = both()[is_real]
    for _ in range(20):
        assert torch.equal(both()[is_real], first)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured[is_real], first)
    hidden_states.copy_(normal(NUM_TOKENS, 512, device=hopper, seed=9))
    graph.replay()
    assert torch.equal(captured[is_real], both()[is_real])


@for_both_kernels
def test_gemms_that_share_the_planners_units_leave_their_counter_at_zero(hopper, kernels):
    counts, dims = COUNTS["many_units"] * 4, Dims(512, 512)
    permutation = permutation_of_counts(counts, kernels.tile_rows, NUM_TOKENS, device=hopper)
    config = gemm_config(dims, counts, WeightFormat(), is_gated=False)
    weights = logical_weights(config, hopper)
    rows = normal(permutation.max_rows, 512, device=hopper, seed=3)
    is_real = real_rows(permutation)
    expected = kernels.grouped(rows, weights, permutation, config=config)[is_real]
    size = WIDE_UNITS if kernels.grouped is wide_gemm2 else SWAPPED_UNITS
    shared = replace(permutation, units=plan_units(permutation, size))
    num_units = int(shared.units.counts[0])
    for uses_pdl in (False, True, True):
        out = kernels.grouped(rows, weights, shared, config=config, uses_pdl=uses_pdl)
        assert torch.equal(out[is_real], expected)
        assert shared.units.counts.tolist() == [num_units, 0]


def test_units_are_not_shared_with_another_stream(hopper):
    permutation = permutation_of_counts([300, 20], 128, NUM_TOKENS, device=hopper)
    permutation = replace(permutation, units=plan_units(permutation, WIDE_UNITS))
    assert units_of(permutation, WIDE_UNITS) is permutation.units
    assert units_of(permutation, SWAPPED_UNITS) is not permutation.units
    with torch.cuda.stream(torch.cuda.Stream()):
        assert units_of(permutation, WIDE_UNITS) is not permutation.units
