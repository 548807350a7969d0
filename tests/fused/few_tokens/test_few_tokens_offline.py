"""The few-token launches, compiled for GPUs that are not here: registers, loads, and what comes before a wait."""

from __future__ import annotations

import os

import pytest
import torch
from gemm.cases import format_id

from moe.flow import Added, TopK
from moe.fused.few_tokens.config import FewTokenConfig, MatvecTile
from moe.gemm.config import FLASHINFER, GemmConfig, WeightFormat
from moe.tuning.gpu import triton_version
from moe.tuning.table import SHIPPED_TABLES, TableEntry, TuningTable

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from emulation.offline_driver import Launch, offline_gpu, unallocated

from moe.fused.few_tokens.experts import few_token_experts

# hidden size, intermediate size, local experts, experts, top k
LAYERS = {
    "qwen3_30b": (2048, 768, 128, 128, 8),
    "qwen3_235b": (4096, 1536, 128, 128, 8),
    "deepseek_v3_ep8": (7168, 2048, 32, 256, 8),
    "mixtral": (4096, 14336, 8, 8, 2),
    "nemotron": (2688, 1856, 128, 128, 6),
    "gpt_oss": (2880, 2880, 32, 32, 4),
    "sonic": (1536, 256, 128, 128, 8),
    "olmoe": (2048, 1024, 64, 64, 8),
    "minimax_m2": (3072, 1536, 256, 256, 8),
    "ragged": (1096, 1000, 16, 16, 3),
}
UNGATED = ("nemotron",)
WEIGHT_LOAD = "ld.global.L1::evict_first.L2::cache_hint.v4"  # they pass through the L1 cache once
VECTOR_LOAD = "ld.global.v4"


def compile_layer(
    arch: int,
    layer: str,
    weight_format: WeightFormat = WeightFormat(),
    *,
    uses_pdl: bool = False,
    num_tokens: int = 3,
    bias_dtype: torch.dtype | None = None,
    has_added: bool = False,
    **tiles: MatvecTile,
) -> list[Launch]:
    hidden_size, intermediate_size, num_local, num_experts, top_k = LAYERS[layer]
    sizes = {"num_experts": num_local, "weight_format": weight_format}
    activation = "Relu2" if layer in UNGATED else "Swiglu"
    gemm1 = GemmConfig(in_features=hidden_size, out_features=intermediate_size, activation=activation, **sizes)
    gemm2 = GemmConfig(in_features=intermediate_size, out_features=hidden_size, **sizes)
    gemms = {"gemm1": gemm1, "gemm2": gemm2}
    config = FewTokenConfig(num_experts=num_experts, top_k=top_k, **gemms, uses_pdl=uses_pdl, **tiles)
    topk = TopK(unallocated(num_tokens, top_k, dtype=torch.int32), unallocated(num_tokens, top_k))
    weights = unallocated(*gemm1.weight_shape), unallocated(*gemm2.weight_shape)
    biases = {}
    if bias_dtype is not None:
        shapes = {"w1_bias": (num_local, gemm1.weight_rows), "w2_bias": (num_local, hidden_size)}
        biases = {name: unallocated(*shape, dtype=bias_dtype) for name, shape in shapes.items()}
    added = Added(unallocated(num_tokens, hidden_size), unallocated(num_tokens)) if has_added else None
    x = unallocated(num_tokens, hidden_size)
    with offline_gpu(arch) as gpu:
        out = few_token_experts(topk, x, *weights, config=config, added=added, **biases)
    assert out.shape == (num_tokens, hidden_size)
    return gpu.launches


CASES = [
    *((90, layer, WeightFormat()) for layer in LAYERS),
    (90, "qwen3_30b", FLASHINFER),
    (90, "qwen3_235b", FLASHINFER),
    (90, "sonic", FLASHINFER),
    (90, "minimax_m2", FLASHINFER),
    (90, "deepseek_v3_ep8", FLASHINFER),
    (80, "qwen3_30b", FLASHINFER),
    (100, "qwen3_30b", WeightFormat()),
]


@pytest.mark.parametrize(
    ("arch", "layer", "weight_format"), CASES, ids=[f"sm{arch}-{layer}-{format_id(fmt)}" for arch, layer, fmt in CASES]
)
def test_weights_load_16_bytes_a_lane_and_nothing_spills(arch, layer, weight_format):
    for launch in compile_layer(arch, layer, weight_format, uses_pdl=arch >= 90):
        report = launch.report
        assert report.spill_bytes == 0
        assert report.count(WEIGHT_LOAD) > 0
        # Beside whole vectors there are ids (32 bits) and weights of the sum (16 bits): at most two a slot, and prefetch.
        top_k = LAYERS[layer][4]
        others = report.count("ld.global") - report.count(WEIGHT_LOAD) - report.count(VECTOR_LOAD)
        assert others <= 3 * top_k + 12
        assert launch.options["launch_pdl"] == (arch >= 90)


def entries_of_this_triton() -> list[TableEntry]:
    """Of the tables that are shipped for an H200, what names a tile of few tokens."""
    release = ".".join(triton_version().split(".")[:2])
    tables = [
        TuningTable.model_validate_json(path.read_text()) for path in SHIPPED_TABLES.glob(f"*triton{release}.json")
    ]
    return [entry for table in tables for entry in table.entries if entry.choice.slot_tile or entry.choice.token_tile]


def compile_entry(entry: TableEntry) -> list[Launch]:
    key, sizes = entry.key, {"num_experts": entry.key.num_local_experts}
    first = WeightFormat(layout=key.layout, is_shuffled=key.is_shuffled, gate_up_order=key.gate_up_order)
    second = WeightFormat(layout=key.gemm2_layout, is_shuffled=key.gemm2_is_shuffled)
    dims = {"in_features": key.hidden_size, "out_features": key.intermediate_size}
    gemm1 = GemmConfig(**sizes, **dims, activation=key.activation, weight_format=first)
    dims = {"in_features": key.intermediate_size, "out_features": key.hidden_size}
    gemm2 = GemmConfig(**sizes, **dims, weight_format=second)
    tiles = {"slot_tile": entry.choice.slot_tile, "token_tile": entry.choice.token_tile}
    layer = {"num_experts": key.num_experts, "top_k": key.top_k, "gemm1": gemm1, "gemm2": gemm2}
    config = FewTokenConfig(**layer, **tiles, uses_pdl=True)
    topk = TopK(unallocated(3, key.top_k, dtype=torch.int32), unallocated(3, key.top_k))
    with offline_gpu(90) as gpu:
        weights = unallocated(*gemm1.weight_shape), unallocated(*gemm2.weight_shape)
        few_token_experts(topk, unallocated(3, key.hidden_size), *weights, config=config)
    return gpu.launches


def test_no_tile_of_a_shipped_table_spills():
    spilled = [
        (entry.bucket, launch.name, launch.report.spill_bytes)
        for entry in entries_of_this_triton()
        for launch in compile_entry(entry)
        if launch.report.spill_bytes
    ]
    assert spilled == []


@pytest.mark.parametrize("limit", [64, 96])
def test_a_tile_may_limit_the_registers_of_its_kernel(limit):
    slot_tile = MatvecTile(block_n=1, block_k=1024, num_warps=4, max_registers=limit)
    token_tile = MatvecTile(block_n=2, block_k=256, max_registers=limit)
    for launch in compile_layer(90, "qwen3_30b", slot_tile=slot_tile, token_tile=token_tile):
        assert f".maxnreg {limit}" in launch.report.ptx
        assert launch.report.registers <= limit


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "olmoe"])  # to which nothing is added
def test_what_is_added_spills_nothing_and_is_read_ahead_of_the_wait(layer):
    plain, added = (compile_layer(90, layer, uses_pdl=True, has_added=has)[-1].report for has in (False, True))
    assert added.spill_bytes == 0
    before = [report.ptx.split("griddepcontrol.wait")[0].count("ld.global") for report in (plain, added)]
    assert before[1] >= before[0] + 2  # values, of several columns in several loads, and the gate


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("arch", "layer"), [(90, "gpt_oss"), (90, "qwen3_30b"), (90, "nemotron"), (80, "gpt_oss")])
def test_layers_with_biases_spill_nothing(arch, layer, bias_dtype):
    weight_format = WeightFormat(gate_up_order="interleaved")
    for launch in compile_layer(arch, layer, weight_format, uses_pdl=arch >= 90, bias_dtype=bias_dtype):
        assert launch.report.spill_bytes == 0
        assert launch.report.count(WEIGHT_LOAD) > 0


@pytest.mark.parametrize("weight_format", [WeightFormat(), FLASHINFER], ids=format_id)
@pytest.mark.parametrize("layer", ["qwen3_235b", "mixtral"])
def test_gemm1_has_registers_for_many_loads_in_flight(layer, weight_format):
    gemm1 = compile_layer(90, layer, weight_format, uses_pdl=True)[0]
    assert gemm1.report.registers >= 96  # with 52, four loads of 16 bytes are in flight; a load takes four registers
    assert gemm1.report.spill_bytes == 0


def test_rows_are_summed_within_a_warp_where_there_are_several():
    gemm2 = compile_layer(90, "qwen3_30b")[1]
    assert gemm2.report.count("bar.sync") == 0
    assert gemm2.options["num_warps"] == 1


def test_the_grid_is_slots_by_columns_then_tokens_by_columns():
    gemm1, gemm2 = compile_layer(90, "qwen3_30b", num_tokens=3)
    assert (gemm1.grid, gemm2.grid) == ((24, 768, 1), (3, 1024, 1))


def before_wait(launch: Launch) -> str:
    assert launch.report.ptx.count("griddepcontrol.wait") == 1
    return launch.report.ptx.split("griddepcontrol.wait")[0]


@pytest.mark.parametrize(("layer", "triggers"), [("qwen3_30b", True), ("deepseek_v3_ep8", False)])
def test_dependent_kernels_touch_nothing_early_and_trigger_after_they_waited_or_at_their_end(layer, triggers):
    gemm1, gemm2 = compile_layer(90, layer, uses_pdl=True)
    assert "ld.global" not in before_wait(gemm1)
    assert "st.global" not in before_wait(gemm1) + before_wait(gemm2)
    for launch in (gemm1, gemm2):
        assert "launch_dependents" not in before_wait(launch)
        assert ("griddepcontrol.launch_dependents" in launch.report.ptx) == triggers


def test_gemm2_has_weights_in_flight_before_it_waits():
    gemm2 = compile_layer(90, "qwen3_30b", uses_pdl=True)[1]
    assert before_wait(gemm2).count(WEIGHT_LOAD) == 24  # 12 steps of 2 rows


@pytest.mark.parametrize("arch", [80, 90])
def test_without_dependent_launches_there_is_no_such_instruction(arch):
    for launch in compile_layer(arch, "qwen3_30b"):
        assert launch.report.count("griddepcontrol") == 0
        assert not launch.options["launch_pdl"]
