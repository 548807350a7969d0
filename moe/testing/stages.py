"""The contract of each stage as one call: the inputs that break kernels, and what must come out.

Each check takes a stage as a pipeline would hold it, runs it on named cases over poisoned memory, and holds it against float64 or
the definition. It returns nothing, and raises AssertionError with the name of the case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe.compose import reference_pipeline
from moe.config import MoEConfig
from moe.flow import Permutation, SwigluParams, TopK
from moe.gemm.config import PARAMETERS, GemmConfig
from moe.gemm.weight_format import pack_bias, pack_weights
from moe.pipeline import MoEPipeline
from moe.stages import Finalizer, Gemm1, Gemm2, Permuter, Router
from moe.testing.closeness import BF16_EPSILON, assert_close_to_exact
from moe.testing.poison import poisoned_memory
from moe.testing.problems import Problem, activated_in_float64, make_problem, random_topk

AWKWARD = MoEConfig.create(
    hidden_size=136, intermediate_size=72, num_experts=8, top_k=2, num_local_experts=6, local_expert_offset=1
)  # multiples of 8 and of nothing larger, and a slice of the experts
NEEDS_GPU = "; a Triton kernel runs on a GPU, or with TRITON_INTERPRET=1 set when Python starts"
GARBAGE = 1 << 30  # what the parts of a permutation hold that nobody may read


@dataclass(frozen=True)
class StageCase:
    """A layer's inputs under a load, and what its references make of them."""

    name: str
    config: MoEConfig
    problem: Problem  # logical weights
    topk: TopK
    permutation: Permutation
    w1: Tensor  # as the layer's format has them
    w2: Tensor

    @property
    def reference(self) -> MoEPipeline:
        return reference_pipeline(self.config)

    @property
    def named(self) -> tuple[Tensor, Tensor]:
        """The slots whose expert is local, as token and choice."""
        token, choice = (self.permutation.row_of_slot >= 0).nonzero(as_tuple=True)
        return token, choice

    def rows_of(self, rows: Tensor) -> Tensor:
        """[P, ..] -> the rows that slots name: the others are undefined."""
        return rows[self.permutation.row_of_slot[self.named].long()]


def stage_cases(config: MoEConfig | None = None, device: torch.device | str = "cpu") -> Iterator[StageCase]:
    """The named cases that the checks run: few and many tokens, none, all on the same experts, idle experts.

    Args:
        config: the layer's sizes and formats; None: AWKWARD.
    """
    config = config or AWKWARD
    num_experts, top_k = config.num_experts, config.top_k
    for num_tokens in (0, 1, 7, 33):
        yield _case(f"{num_tokens} tokens", config, random_topk(num_tokens, num_experts, top_k, device=device))
    same = random_topk(19, num_experts, top_k, device=device)
    yield _case(
        "all tokens on the same experts",
        config,
        TopK(torch.arange(top_k, device=device).int().expand(19, top_k).contiguous(), same.weights),
    )
    if num_experts >= 2 * top_k:
        half = random_topk(40, num_experts // 2, top_k, device=device)
        yield _case(
            "experts without tokens", config, TopK(half.expert_ids + num_experts - num_experts // 2, half.weights)
        )


def _case(name: str, config: MoEConfig, topk: TopK) -> StageCase:
    device = topk.expert_ids.device
    problem = make_problem(config, topk.expert_ids.shape[0], device=device)
    w1 = pack_weights(problem.w1, config.gemm1.weight_format, is_gated=config.gemm1.is_gated)
    w2 = pack_weights(problem.w2, config.gemm2.weight_format, is_gated=False)
    permutation = _poisoned(reference_pipeline(config).permute(topk))
    return StageCase(name, config, problem, topk, permutation, w1, w2)


def _poisoned(permutation: Permutation) -> Permutation:
    """With garbage in what is undefined: padding rows' tokens, and tiles past the last."""
    first = int(permutation.num_tiles)
    experts, limits = permutation.expert_of_tile.clone(), permutation.row_limit_of_tile.clone()
    experts[first:] = limits[first:] = GARBAGE
    tokens = torch.where(permutation.token_of_row < 0, GARBAGE, permutation.token_of_row)
    return replace(permutation, expert_of_tile=experts, row_limit_of_tile=limits, token_of_row=tokens)


@contextmanager
def _named(stage: str, case: str) -> Iterator[None]:
    """What goes wrong within it says in which case."""
    try:
        with poisoned_memory():
            yield
    except Exception as error:
        hint = NEEDS_GPU if "active driver" in str(error) else ""
        raise AssertionError(f"{stage}, {case}: {type(error).__name__}: {error}{hint}") from error


def check_gemm1(
    gemm1: Gemm1,
    *,
    config: MoEConfig | None = None,
    device: torch.device | str = "cpu",
    takes_swiglu: bool = False,
    takes_bias: bool = False,
) -> None:
    """Hold a gemm1 against float64: `gemm1(hidden_states, w1, permutation)` -> [P, I].

    Args:
        config: the layer that it is for, which may hold a slice of its experts; None: AWKWARD, with SwiGLU.
        takes_swiglu: also with alpha, beta and limit an expert, as `swiglu=SwigluParams(..)`.
        takes_bias: also with `bias=` [E_local, rows of W1], in bf16 and in float32.

    Raises:
        AssertionError: naming the case and what was wrong in it.
    """
    for case in stage_cases(config, device):
        gemm = case.config.gemm1
        for swiglu in (None, _swiglu(case)) if takes_swiglu else (None,):
            for bias in _biases(case, gemm, takes_bias=takes_bias):
                more: dict[str, Any] = {} if swiglu is None else {"swiglu": swiglu}
                more |= {} if bias is None else {"bias": pack_bias(bias, gemm.weight_format, is_gated=gemm.is_gated)}
                with _named("gemm1", case.name + (" and SwiGLU's parameters" if swiglu else "") + _named_bias(bias)):
                    tensors = (case.problem.hidden_states, case.w1, case.permutation)
                    out, reference = gemm1(*tensors, **more), case.reference.gemm1(*tensors, **more)
                    _expect_shape(out, case.permutation.max_rows, case.config.intermediate_size)
                    exact = _exact_gemm1(case, swiglu, bias)
                    assert_close_to_exact(case.rows_of(out), case.rows_of(reference), exact)


def check_gemm2(
    gemm2: Gemm2, *, config: MoEConfig | None = None, device: torch.device | str = "cpu", takes_bias: bool = False
) -> None:
    """Hold a gemm2 against float64: `gemm2(rows, w2, permutation)` -> [P, H]. Rows of padding hold NaN.

    Args:
        config: the layer that it is for, which may hold a slice of its experts; None: AWKWARD.
        takes_bias: also with `bias=` [E_local, H], in bf16 and in float32.

    Raises:
        AssertionError: naming the case and what was wrong in it.
    """
    for case in stage_cases(config, device):
        gemm = case.config.gemm2
        for bias in _biases(case, gemm, takes_bias=takes_bias):
            more = {} if bias is None else {"bias": pack_bias(bias, gemm.weight_format, is_gated=False)}
            with _named("gemm2", case.name + _named_bias(bias)):
                rows = _rows(case, case.config.intermediate_size)
                out, reference = (run(rows, case.w2, case.permutation, **more) for run in (gemm2, case.reference.gemm2))
                _expect_shape(out, case.permutation.max_rows, case.config.hidden_size)
                exact = _product(case, case.rows_of(rows), case.problem.w2, bias)
                assert_close_to_exact(case.rows_of(out), case.rows_of(reference), exact)


def check_finalize(finalize: Finalizer, *, config: MoEConfig | None = None, device: torch.device | str = "cpu") -> None:
    """Hold a finalize against float64: `finalize(rows, topk, permutation, output=..)` -> [T, H].

    With weights in bf16 and in float32, with memory of the caller's and without. Rows of padding hold NaN.

    Raises:
        AssertionError: naming the case and what was wrong in it.
    """
    for case in stage_cases(config, device):
        rows = _rows(case, case.config.hidden_size)
        exact = torch.zeros(len(case.topk.weights), rows.shape[1], dtype=torch.float64, device=rows.device)
        token, choice = case.named
        exact.index_add_(0, token, case.rows_of(rows).double() * case.topk.weights[token, choice, None].double())
        for topk in (case.topk, TopK(case.topk.expert_ids, case.topk.weights.float())):
            for output in (None, torch.full(exact.shape, torch.nan, dtype=torch.bfloat16, device=rows.device)):
                where = "the caller's memory" if output is not None else "memory of its own"
                with _named("finalize", f"{case.name}, weights {topk.weights.dtype}, {where}"):
                    out = finalize(rows, topk, case.permutation, output=output)
                    _expect_shape(out, *exact.shape)
                    if output is not None and out.data_ptr() != output.data_ptr():
                        raise AssertionError("expected the result in `output`, got another tensor")
                    assert_close_to_exact(out, case.reference.finalize(rows, topk, case.permutation), exact)


def check_permute(permute: Permuter, *, config: MoEConfig | None = None, device: torch.device | str = "cpu") -> None:
    """Hold a permute against its definition: `permute(topk)` -> Permutation, in any order of rows that its maps agree on.

    Raises:
        AssertionError: naming the case and what was wrong in it.
    """
    for case in stage_cases(config, device):
        with _named("permute", case.name):
            _expect_permutation(permute(case.topk), case)


def check_route(route: Router, *, config: MoEConfig | None = None, device: torch.device | str = "cpu") -> None:
    """Hold a route against the rule's reference: `route(logits, bias, replay_out=..)` -> TopK, ids best first.

    Raises:
        AssertionError: naming the case and what was wrong in it.
    """
    for case in stage_cases(config, device):
        logits = case.problem.logits
        bias = None
        if case.config.routing.method.uses_bias:
            bias = 0.01 * torch.linspace(-1, 1, case.config.num_experts, device=logits.device)
        wanted = case.reference.route(logits, bias)
        replay = torch.full((len(logits) + 1, case.config.top_k), -7, dtype=torch.int16, device=logits.device)
        for replay_out in (None, replay):
            with _named("route", case.name + (", recording" if replay_out is not None else "")):
                topk = route(logits, bias, replay_out=replay_out)
                _expect_same_choices(topk, wanted)
        with _named("route", f"{case.name}, recording"):
            if not torch.equal(replay[:-1].int(), wanted.expert_ids) or not (replay[-1] == -7).all():
                raise AssertionError("expected the ids in the first T rows of replay_out, and no more")


def _swiglu(case: StageCase) -> SwigluParams:
    count, device = case.config.gemm1.num_experts, case.w1.device
    activation = case.config.gemm1.activation
    assert activation is not None
    names = PARAMETERS.get(activation, ())
    ranges = {"alpha": (0.5, 1.7), "beta": (-0.2, 1), "clamp_limit": (0.3, 7)}
    return SwigluParams(**{name: torch.linspace(*ranges[name], count, device=device) for name in names})


def _biases(case: StageCase, gemm: GemmConfig, *, takes_bias: bool) -> Iterator[Tensor | None]:
    """None, and logical ones [E_local, N] of both dtypes, of the size of the products."""
    yield None
    generator = torch.Generator(device=case.w1.device).manual_seed(2)
    for dtype in (torch.bfloat16, torch.float32) if takes_bias else ():
        drawn = torch.randn(gemm.num_experts, gemm.weight_rows, generator=generator, device=case.w1.device)
        yield drawn.to(dtype)


def _named_bias(bias: Tensor | None) -> str:
    return "" if bias is None else f" and a bias in {bias.dtype}"


def _rows(case: StageCase, width: int) -> Tensor:
    """[P, width] normal, NaN where no slot points."""
    generator = torch.Generator(device=case.w1.device).manual_seed(1)
    rows = torch.full((case.permutation.max_rows, width), torch.nan, dtype=torch.bfloat16, device=case.w1.device)
    token, _ = case.named
    drawn = torch.randn(len(token), width, generator=generator, device=rows.device).bfloat16()
    rows[case.permutation.row_of_slot[case.named].long()] = drawn
    return rows


def _experts_of_slots(case: StageCase) -> Tensor:
    return case.topk.expert_ids[case.named].long() - case.config.permute.local_expert_offset


def _product(case: StageCase, rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row by row times its expert's logical weights [E_local, N, K], plus its bias [E_local, N], in float64."""
    expert = _experts_of_slots(case)
    exact = torch.empty(len(rows), weights.shape[1], dtype=torch.float64, device=rows.device)
    for local_id in expert.unique().tolist():
        exact[expert == local_id] = rows[expert == local_id].double() @ weights[local_id].double().T
        if bias is not None:
            exact[expert == local_id] += bias[local_id].double()
    return exact


def _exact_gemm1(case: StageCase, swiglu: SwigluParams | None, bias: Tensor | None) -> Tensor:
    product = _product(case, case.problem.hidden_states[case.named[0]], case.problem.w1, bias)
    config: GemmConfig = case.config.gemm1
    assert config.activation is not None
    expert = _experts_of_slots(case)
    exact = torch.empty(len(product), config.out_features, dtype=torch.float64, device=product.device)
    for local_id in expert.unique().tolist():
        chosen = expert == local_id
        exact[chosen] = activated_in_float64(product[chosen], config.activation, local_id, swiglu)
    return exact


def _expect_shape(out: object, *shape: int) -> None:
    if not isinstance(out, Tensor):
        raise AssertionError(f"expected a tensor {list(shape)} bfloat16, got {type(out).__name__}")
    if tuple(out.shape) != shape or out.dtype != torch.bfloat16:
        raise AssertionError(f"expected {list(shape)} bfloat16, got {list(out.shape)} {out.dtype}")


def _expect_same_choices(topk: TopK, wanted: TopK) -> None:
    if topk.expert_ids.dtype != torch.int32 or not torch.equal(topk.expert_ids, wanted.expert_ids):
        raise AssertionError("expected the reference's expert_ids, int32, best first")
    off = (topk.weights.double() - wanted.weights.double()).abs()
    if not (off <= 4 * BF16_EPSILON * wanted.weights.double().abs()).all():
        raise AssertionError(f"expected the reference's weights, got some off by {off.max().item():.1e}")


def _expect_permutation(made: Permutation, case: StageCase) -> None:
    """Every local slot has a row of its own, in a tile of its expert, which knows the slot's token."""
    first, count = case.config.permute.local_expert_offset, case.config.permute.num_local_experts
    local = case.topk.expert_ids.long() - first
    is_local = (local >= 0) & (local < count)
    rows_of_slot = made.row_of_slot.long()
    num_rows, num_tiles = int(made.num_rows), int(made.num_tiles)
    _expect("num_rows is tile_rows times num_tiles", num_rows == num_tiles * made.tile_rows)
    _expect("no more tiles than max_tiles", num_tiles <= made.max_tiles)
    _expect("-1 for slots whose expert is not here, a row for the others", torch.equal(rows_of_slot >= 0, is_local))
    rows = rows_of_slot[is_local]
    _expect("a row of its own for each slot", len(rows.unique()) == len(rows))
    _expect("rows below num_rows", bool((rows < num_rows).all()))
    token = torch.arange(len(local), device=rows.device)[:, None].expand_as(local)
    _expect("token_of_row to be the slot's token", torch.equal(made.token_of_row[rows].long(), token[is_local]))
    tiles = rows // made.tile_rows
    _expect("tiles of the slot's expert", torch.equal(made.expert_of_tile[tiles].long(), local[is_local]))
    _expect("rows below their tile's limit", bool((rows < made.row_limit_of_tile[tiles]).all()))
    _expect("-1 as the token of padding", int((made.token_of_row[:num_rows] >= 0).sum()) == len(rows))


def _expect(what: str, is_so: bool) -> None:
    if not is_so:
        raise AssertionError(f"expected {what}")
