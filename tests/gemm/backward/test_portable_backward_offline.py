"""The portable backward kernels, compiled for GPUs that are not here: registers, shared memory, instructions."""

from __future__ import annotations

import pytest
import torch
from emulation.gpu_limits import SHARED_LIMIT_OF_ARCH

from moe.flow import Permutation, SwigluParams, TopK
from moe.gemm.config import GemmConfig, WeightFormat

pytest.importorskip("triton")
from triton import knobs

if knobs.runtime.interpret:
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from emulation.offline_driver import OfflineGpu, offline_gpu, unallocated

import moe.gemm.backward.dgrad
import moe.gemm.backward.wgrad
import moe.gemm.portable.tile
from moe.gemm.backward.dgrad import portable_gemm1_dgrad, portable_gemm2_dgrad
from moe.gemm.backward.keeping import portable_gemm1_keeping
from moe.gemm.backward.wgrad import launch_portable_gemm1_wgrad, launch_portable_gemm2_wgrad

NUM_EXPERTS, NUM_TOKENS, HIDDEN, INTERMEDIATE = 128, 16, 2048, 768
ARCHES = (80, 89, 90)


def compile_stages(
    arch: int,
    tile_rows: int,
    *,
    activation: str = "Swiglu",
    layout: str = "MajorK",
    swiglu: SwigluParams | None = None,
    is_sum: bool = False,
) -> OfflineGpu:
    """The launches of all five stages of a layer."""
    max_rows = NUM_EXPERTS * tile_rows
    permutation = Permutation(
        row_of_slot=unallocated(NUM_TOKENS, 8, dtype=torch.int32),
        token_of_row=unallocated(max_rows, dtype=torch.int32),
        expert_of_tile=unallocated(NUM_EXPERTS, dtype=torch.int32),
        row_limit_of_tile=unallocated(NUM_EXPERTS, dtype=torch.int32),
        num_rows=unallocated(1, dtype=torch.int32),
        num_tiles=unallocated(1, dtype=torch.int32),
        tile_rows=tile_rows,
    )
    shared = {"num_experts": NUM_EXPERTS, "weight_format": WeightFormat(layout=layout)}
    gemm1 = GemmConfig(in_features=HIDDEN, out_features=INTERMEDIATE, activation=activation, **shared)
    gemm2 = GemmConfig(in_features=INTERMEDIATE, out_features=HIDDEN, **shared)
    x, w1, w2 = unallocated(NUM_TOKENS, HIDDEN), unallocated(*gemm1.weight_shape), unallocated(*gemm2.weight_shape)
    topk = TopK(unallocated(NUM_TOKENS, 8, dtype=torch.int32), unallocated(NUM_TOKENS, 8, dtype=torch.float32))
    outs = [unallocated(*config.weight_shape, dtype=torch.float32) if is_sum else None for config in (gemm1, gemm2)]
    with offline_gpu(arch) as gpu:  # weight gradients without checks, which ask where memory lies
        kept = portable_gemm1_keeping(x, w1, permutation, config=gemm1, swiglu=swiglu)
        grads = portable_gemm2_dgrad(x, w2, kept.gate_up, topk, permutation, config=gemm2, gemm1=gemm1, swiglu=swiglu)
        rows = portable_gemm1_dgrad(grads.grad_gate_up, w1, permutation, config=gemm1)
        grad_w1 = launch_portable_gemm1_wgrad(grads.grad_gate_up, x, permutation, config=gemm1, out=outs[0])
        grad_w2 = launch_portable_gemm2_wgrad(x, grads.weighted_activation, permutation, config=gemm2, out=outs[1])
    assert (rows.shape, grad_w1.shape, grad_w2.shape) == ((max_rows, HIDDEN), gemm1.weight_shape, gemm2.weight_shape)
    assert grads.grad_weights.shape == (NUM_TOKENS, 8)
    return gpu


def pretend_to_be(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moe.gemm.backward.dgrad, moe.gemm.backward.wgrad, moe.gemm.portable.tile):
        monkeypatch.setattr(module, "shared_memory_limit", lambda device: SHARED_LIMIT_OF_ARCH[arch])
    # Kernels are kept by device, of which there is one here.
    for module in (moe.gemm.backward.dgrad, moe.gemm.backward.wgrad):
        module._kernel_of.cache_clear()


def assert_are_tight(gpu: OfflineGpu, *, num_gemms: int = 5) -> None:
    gemms = 0
    for launch in gpu.launches:
        report = launch.report
        assert report.spill_bytes == 0, launch.name
        assert report.fits, launch.name
        if launch.name.startswith("portable"):
            gemms += 1
            assert report.count("cp.async.cg") > 0, launch.name
            assert report.count("ld.global.b16") == 0, launch.name
    assert gemms == num_gemms


@pytest.mark.parametrize("tile_rows", [16, 64, 128], ids="tile_rows{}".format)
@pytest.mark.parametrize("arch", ARCHES, ids="sm{}".format)
def test_default_tiles_spill_nothing_and_fit(monkeypatch, arch, tile_rows):
    pretend_to_be(arch, monkeypatch)
    assert_are_tight(compile_stages(arch, tile_rows))


@pytest.mark.parametrize("arch", [80, 90], ids="sm{}".format)
@pytest.mark.parametrize(
    "options",
    [{"layout": "MajorMn"}, {"activation": "Relu2"}, {"is_sum": True}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_layers_spill_nothing_and_fit(monkeypatch, arch, options):
    pretend_to_be(arch, monkeypatch)
    assert_are_tight(compile_stages(arch, 128, **options))


def test_parameters_of_swiglu_cost_no_spills():
    parameter = unallocated(NUM_EXPERTS, dtype=torch.float32)
    assert_are_tight(compile_stages(90, 128, swiglu=SwigluParams(parameter, parameter, parameter)))
