"""Which kernel runs a grouped GEMM: by load, rows of a tile, GPU, and what a config names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gemm.hopper.cases import permutation_of_counts

from moe.config import MoEConfig
from moe.gemm import kernels
from moe.gemm.config import GemmConfig, WeightFormat, WeightLayout
from moe.gemm.swapped import gemm1 as swapped_gemm1
from moe.gemm.swapped import gemm2 as swapped_gemm2
from moe.gemm.swapped.tile import SWAPPED_UNITS
from moe.gemm.wide import gemm1 as wide_gemm1
from moe.gemm.wide import gemm2 as wide_gemm2
from moe.gemm.wide.tile import WIDE_UNITS

CONFIG = MoEConfig.create(hidden_size=128, intermediate_size=128, num_experts=4, top_k=2)
CPU = torch.device("cpu")


def clear_caches() -> None:
    for cached in (kernels.kernels_for, kernels.kernel_for, kernels.unit_size):
        cached.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was run, by family."""
    families: list[str] = []
    for stage, table in kernels.KERNELS.items():
        noting = [
            kernel._replace(launch=lambda *args, family=kernel.family, **more: families.append(family))
            for kernel in table
        ]
        monkeypatch.setitem(kernels.KERNELS, stage, tuple(noting))
    clear_caches()
    yield families
    clear_caches()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (wide_gemm1, wide_gemm2, swapped_gemm1, swapped_gemm2):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    clear_caches()
    yield
    clear_caches()


def run_both(config: MoEConfig, mean_rows: int, tile_rows: int) -> None:
    permutation = replace(permutation_of_counts([5, 9, 0, 2], tile_rows, 8), mean_rows=mean_rows)
    hidden_states, rows = torch.zeros(8, 128), torch.zeros(permutation.max_rows, 128)
    kernels.launch_gemm1(hidden_states, torch.zeros(1), permutation, config=config.gemm1)
    kernels.launch_gemm2(rows, torch.zeros(1), permutation, config=config.gemm2)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("mean_rows", "tile_rows", "kind"),
    [
        (0, 16, "portable"),
        (48, 64, "portable"),
        (49, 64, "swapped"),
        (160, 128, "swapped"),
        (161, 128, "wide"),
        (161, 64, "wide"),
        (161, 32, "swapped"),  # the wide kernels take no such tiles
        (9999, 16, "swapped"),
    ],
)
def test_the_load_and_the_tiles_choose_and_the_planner_cuts_units_for_that(mean_rows, tile_rows, kind, ran):
    run_both(CONFIG, mean_rows, tile_rows)
    assert ran == [kind, kind]
    size = kernels.unit_size(CPU, tile_rows, mean_rows, gemm1=CONFIG.gemm1, gemm2=CONFIG.gemm2)
    assert size == {"portable": None, "swapped": SWAPPED_UNITS, "wide": WIDE_UNITS}[kind]


@pytest.mark.parametrize("mean_rows", [1, 100, 1000])
def test_elsewhere_the_portable_kernels_run(mean_rows: int, ran):
    run_both(CONFIG, mean_rows, 64)
    assert ran == ["portable", "portable"]


@pytest.mark.usefixtures("hopper")
def test_what_a_config_names_runs_where_it_takes_the_problem(ran):
    gemm1, gemm2 = (GemmConfig(**dict(gemm) | {"kernel": "wide"}) for gemm in (CONFIG.gemm1, CONFIG.gemm2))
    named = MoEConfig(**dict(CONFIG) | {"gemm1": gemm1, "gemm2": gemm2})
    run_both(named, 1, 64)
    run_both(named, 1, 16)
    assert ran == ["wide", "wide", "portable", "portable"]


@pytest.mark.usefixtures("hopper")
def test_gemms_of_two_kernels_share_no_units(ran):
    gemm2 = GemmConfig(**dict(CONFIG.gemm2) | {"kernel": "portable"})
    run_both(MoEConfig(**dict(CONFIG) | {"gemm2": gemm2}), 1000, 128)
    assert ran == ["wide", "portable"]
    assert kernels.unit_size(CPU, 128, 1000, gemm1=CONFIG.gemm1, gemm2=gemm2) is None


@pytest.mark.usefixtures("hopper")
def test_weights_that_no_hopper_kernel_reads_are_left_to_the_portable_ones(ran):
    config = MoEConfig.create(
        hidden_size=128,
        intermediate_size=128,
        num_experts=4,
        top_k=2,
        weight_format=WeightFormat(layout=WeightLayout.MajorMn, is_shuffled=True),
    )
    run_both(config, 1000, 128)
    assert ran == ["portable", "portable"]


def test_a_stage_with_its_checks_refuses_before_any_kernel_is_launched(ran):
    permutation = permutation_of_counts([5, 9, 0, 2], 16, 8)
    hidden_states = torch.zeros(8, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemm1_weights: expected 3-D"):
        kernels.run_gemm1(hidden_states, torch.zeros(1).bfloat16(), permutation, config=CONFIG.gemm1)
    rows = torch.zeros(permutation.max_rows, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemm2_weights: expected 3-D"):
        kernels.run_gemm2(rows, torch.zeros(1).bfloat16(), permutation, config=CONFIG.gemm2)
    assert ran == []


@pytest.mark.parametrize("module", [wide_gemm1, wide_gemm2, swapped_gemm1, swapped_gemm2], ids=lambda m: m.__name__)
def test_a_launch_takes_what_its_checked_twin_takes(module):
    name = ".".join(module.__name__.split(".")[-2:]).replace(".", "_")  # moe.gemm.wide.gemm1: wide_gemm1
    checked, launched = getattr(module, name), getattr(module, f"launch_{name}")
    taken = dict(inspect.signature(launched).parameters)
    taken.pop("kept", None)  # training's alone, whose stages check it
    assert taken == dict(inspect.signature(checked).parameters)
    assert launched in [kernel.launch for table in kernels.KERNELS.values() for kernel in table]
