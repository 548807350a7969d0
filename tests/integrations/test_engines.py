"""What of the engines' plug-ins needs no engine: that they sleep, what they say, and the call that both make."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import moe.integrations.plugins.sglang
import moe.integrations.plugins.vllm
from moe.gemm.config import ActivationType
from moe.integrations import sglang, vllm
from moe.integrations.engine_layer import EngineLayer, call_layer, local_ids, why_not
from moe.integrations.hf_experts import Gate
from moe.testing.closeness import relative_error

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LAYER = EngineLayer(hidden_size=64, intermediate_size=48, num_local_experts=6, top_k=2)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(num_experts: int) -> tuple[Tensor, Tensor]:
    w1 = (normal(num_experts, 96, 64, seed=1) / 8).bfloat16()
    return w1, (normal(num_experts, 64, 48, seed=2) / 7).bfloat16()


def expected(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, limit: float = float("inf")) -> Tensor:
    """In float64, expert by expert; ids outside [0, E) count nothing."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, of_row) in enumerate(zip(ids.tolist(), weights.double())):
        for expert, weight in zip(row, of_row):
            if 0 <= expert < len(w1):
                gate, up = (w1[expert].double() @ x[token].double()).chunk(2)
                result[token] += weight * (
                    w2[expert].double() @ (torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit))
                )
    return result


def test_plug_ins_are_found_by_the_name_that_the_pages_give():
    for group, module in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
        found = [point for point in entry_points(group=group) if point.name == "moe_stages"]
        if not found:
            pytest.skip("moe-stages is not installed, or was before it had plug-ins")
        assert [point.value for point in found] == [f"moe.integrations.plugins.{module}:plugin"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_finding_a_plug_in_imports_its_module_and_nothing_else_of_weight(engine: str):
    code = (
        "import importlib.metadata, os, sys\n"  # what an engine has imported long before
        "before = set(sys.modules)\n"
        f"from moe.integrations.plugins.{engine} import plugin\n"
        f"plugin() if {engine!r} == 'vllm' else None\n"
        "new = set(sys.modules) - before\n"
        "heavy = {name.split('.')[0] for name in new} & {'torch', 'vllm', 'sglang', 'pydantic', 'numpy'}\n"
        "print(sorted(heavy), sorted(name for name in new if name.split('.')[0] == 'moe'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    ours = ["moe", "moe.integrations", "moe.integrations.plugins", f"moe.integrations.plugins.{engine}"]
    assert result.stdout.strip() == f"[] {ours}"


def test_importing_moe_and_its_integrations_imports_no_engine():
    code = (
        "import sys, moe, moe.integrations.vllm, moe.integrations.sglang\n"
        "print(sorted(name for name in ('vllm', 'sglang') if name in sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_vllms_plug_in_sleeps_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str | None):
    if value is None:
        monkeypatch.delenv("MOE_VLLM", raising=False)
    else:
        monkeypatch.setenv("MOE_VLLM", value)
    moe.integrations.plugins.vllm.plugin()  # and so looks for no vLLM: there is none here
    assert not vllm.is_asked_for()


def test_vllms_plug_in_says_which_values_it_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOE_VLLM", "yes")
    with pytest.raises(ValueError, match=r"MOE_VLLM: expected 1 .*, only .* or 0, got 'yes'"):
        moe.integrations.plugins.vllm.plugin()


@pytest.mark.parametrize(("value", "refuses"), [("1", False), ("only", True)])
def test_vllms_plug_in_refuses_other_layers_only_where_it_was_told_to(
    monkeypatch: pytest.MonkeyPatch, value: str, refuses: bool
):
    monkeypatch.setenv("MOE_VLLM", value)
    assert vllm.is_asked_for()
    assert vllm.refuses_others() is refuses


@pytest.mark.parametrize("release", ["0.32.0", "0.33.0", "0.33.1+cu130", "0.33.0rc2"])
def test_releases_of_vllm_that_were_tried_are_taken(release: str):
    vllm.expect_known(release)


@pytest.mark.parametrize("release", ["0.31.0", "0.34.0", "0.3.0", "1.33.0", "0.330.0"])
def test_releases_of_vllm_that_were_not_tried_are_refused_in_words(release: str):
    with pytest.raises(RuntimeError, match=rf"expected vllm 0\.32 or 0\.33, got {release}; .*unset MOE_VLLM"):
        vllm.expect_known(release)


@pytest.mark.parametrize("release", ["0.5.21", "0.5.22", "0.5.23", "0.5.23+cu130"])
def test_releases_of_sglang_that_were_tried_are_taken(release: str):
    sglang.expect_known(release)


@pytest.mark.parametrize("release", ["0.5.20", "0.5.24", "0.5.2", "0.6.0"])
def test_releases_of_sglang_that_were_not_tried_are_refused_in_words(release: str):
    with pytest.raises(RuntimeError, match=rf"expected sglang 0\.5\.21.*, got {release}; .*--moe-runner-backend"):
        sglang.expect_known(release)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_map_of_experts_is_followed_and_stale_ids_are_none(dtype: torch.dtype):
    expert_map = torch.tensor([3, -1, 0, -1, 3, 1], dtype=torch.int32)  # no range, and two names for one place
    ids = torch.tensor([[0, 1], [2, 4], [5, -1], [2071690107, 6], [-1, -1], [-7, 3]], dtype=dtype)
    mapped = local_ids(ids, expert_map)
    assert mapped.tolist() == [[3, -1], [0, 3], [1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert mapped.dtype == torch.int32


def test_without_a_map_ids_are_handed_on_as_they_are():
    ids = torch.tensor([[0, -1]], dtype=torch.int32)
    assert local_ids(ids, None) is ids


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_is_right_and_skips_padding_and_stale_ids(dtype: torch.dtype, weight_dtype: torch.dtype):
    x, (w1, w2) = normal(9, 64, seed=3).bfloat16(), weights_of(6)
    ids = torch.randint(0, 6, (9, 2), generator=torch.Generator().manual_seed(4)).to(dtype)
    ids[4], ids[7, 0] = -1, 2071690107
    x[4] = float("nan")  # a padded token may hold anything
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(5)).to(weight_dtype)
    output = torch.full((9, 64), float("nan"), dtype=torch.bfloat16)
    assert call_layer(LAYER, x, ids, weights, w1, w2, output).data_ptr() == output.data_ptr()
    assert output[4].tolist() == [0.0] * 64
    x[4] = 0
    assert relative_error(output, expected(x, ids, weights, w1, w2)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 300])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_call_through_a_map_is_right_on_a_gpu_and_as_captured(dtype: torch.dtype, num_tokens: int):
    gpu = torch.device("cuda")
    w1, w2 = weights_of(6)
    layer = LAYER._replace(gate=Gate(clamp_limit=0.5))
    x, expert_map = normal(num_tokens, 64, seed=3).bfloat16(), torch.tensor([3, -1, 0, -1, 3, 1, 5, 2])
    ids = torch.randint(0, 8, (num_tokens, 2), generator=torch.Generator().manual_seed(4)).to(dtype)
    ids[num_tokens // 2, 0] = 2071690107
    weights = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(5))
    given = [value.to(gpu) for value in (ids, expert_map.int(), x, weights, w1, w2)]

    def step(output: Tensor) -> Tensor:
        ids, expert_map, *others = given
        return call_layer(layer, others[0], local_ids(ids, expert_map), *others[1:], output)

    output = step(torch.full_like(given[2], float("nan"))).clone()
    known = (ids >= 0) & (ids < 8)
    places = torch.where(known, expert_map[ids.clamp(0, 7).long()], -1)
    assert relative_error(output.cpu(), expected(x, places, weights, w1, w2, limit=0.5)) < 1e-2
    captured, graph = torch.full_like(output, float("nan")), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step(captured)
    graph.replay()
    assert torch.equal(captured, output)


def test_tokens_of_which_no_expert_is_here_give_zeros():
    w1, w2 = weights_of(6)
    x, weights = normal(3, 64, seed=3).bfloat16(), torch.ones(3, 2)
    output = torch.full((3, 64), float("nan"), dtype=torch.bfloat16)
    call_layer(LAYER, x, torch.full((3, 2), -1, dtype=torch.int32), weights, w1, w2, output)
    assert not output.any()


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_ranks_that_share_the_experts_in_turns_sum_to_the_layer(num_ranks: int):
    x, (w1, w2) = normal(7, 64, seed=3).bfloat16(), weights_of(6)
    ids = torch.randint(0, 6, (7, 2), generator=torch.Generator().manual_seed(4)).int()
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(5))
    total = torch.zeros(7, 64)
    for rank in range(num_ranks):
        mine = list(range(rank, 6, num_ranks))
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        layer = LAYER._replace(num_local_experts=len(mine))
        total += call_layer(layer, x, local_ids(ids, expert_map), weights, w1[mine], w2[mine]).float()
    assert relative_error(total, expected(x, ids, weights, w1, w2)) < 1e-2


def test_weights_rewritten_in_place_are_the_ones_that_the_next_call_reads():
    x, (w1, w2) = normal(5, 64, seed=3).bfloat16(), weights_of(6)
    ids, weights = torch.tensor([[0, 1]] * 5, dtype=torch.int32), torch.ones(5, 2)
    first = call_layer(LAYER, x, ids, weights, w1, w2)
    w2.mul_(2)
    assert torch.equal(call_layer(LAYER, x, ids, weights, w1, w2), first * 2)


def test_no_tokens_give_no_rows():
    w1, w2 = weights_of(6)
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    assert call_layer(LAYER, empty, torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), w1, w2).shape == (0, 64)


@pytest.mark.parametrize(
    ("layer", "dtype", "words"),
    [
        (LAYER, torch.float16, "dtype: expected bfloat16, got float16"),
        (LAYER._replace(hidden_size=511), torch.bfloat16, "hidden_size: .*511"),
        (LAYER._replace(intermediate_size=20), torch.bfloat16, "intermediate_size: .*20"),
        (LAYER._replace(gate=Gate(clamp_limit=0.0)), torch.bfloat16, r"limit of the gate: .* positive .*0\.0"),
        (LAYER._replace(gate=Gate(clamp_limit=float("nan"))), torch.bfloat16, r"limit of the gate: .* positive .*nan"),
        (
            LAYER._replace(activation=ActivationType.Situ, gate=Gate(4.0, 0.0)),
            torch.bfloat16,
            r"beta of situ: .* positive .*0\.0",
        ),
    ],
    ids=["dtype", "hidden size", "intermediate size", "limit of 0", "limit that is no number", "number of situ"],
)
def test_what_the_layer_does_not_compute_is_told_by_field(layer: EngineLayer, dtype: torch.dtype, words: str):
    reason = why_not(layer, dtype, CPU)
    assert reason is not None
    assert "\n" not in reason
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reason)


def test_layers_of_ours_are_told_so():
    assert why_not(LAYER, torch.bfloat16, CPU) is None
    assert why_not(LAYER._replace(num_local_experts=1), torch.bfloat16, CPU) is None  # fewer than a token chooses
    assert why_not(LAYER._replace(gate=Gate(1.702, 1.0, 7.0)), torch.bfloat16, CPU) is None


def test_a_compiled_call_is_one_graph_for_any_number_of_tokens():
    w1, w2 = weights_of(6)
    expert_map = torch.tensor([0, -1, 1, 2, 3, 4], dtype=torch.int32)

    def step(x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> Tensor:
        return call_layer(LAYER, x, local_ids(ids, expert_map), weights, w1, w2, output) + 1

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for count in range(3, 23):
            x = normal(count, 64, seed=count).bfloat16()
            ids, weights = torch.randint(0, 6, (count, 2)).int(), torch.rand(count, 2)
            outputs = [torch.empty(count, 64, dtype=torch.bfloat16) for _ in range(2)]
            assert torch.equal(compiled(x, ids, weights, outputs[0]), step(x, ids, weights, outputs[1]))
            assert torch.equal(*outputs)
    assert counter.frame_count == 1
