"""A family of GEMM kernels as the contract's tests know it: its two functions, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gemm.cases import GARBAGE, GemmCase, format_id, ids_of_loads, make_case
from torch import Tensor

from moe.flow import SwigluParams
from moe.gemm.config import ACTIVATIONS, SHUFFLE_ROWS, ActivationType, GemmKernel, WeightFormat
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference
from moe.testing.closeness import assert_close_to_exact

Dims = tuple[int, int]  # in_features, out_features


@dataclass(frozen=True)
class Problem:
    """What a case is of, but for its rows."""

    activation: str | None  # None: gemm2
    dims: Dims
    weight_format: WeightFormat

    def __str__(self) -> str:
        stage = f"gemm1-{self.activation}" if self.activation else "gemm2"
        return f"{stage}-{self.dims[0]}x{self.dims[1]}-{format_id(self.weight_format)}"


@dataclass(frozen=True)
class Family:
    """gemm1 and gemm2 of a family. Names of fields that tests are parametrised with are in `AXES`."""

    gemm1: Callable[..., Tensor]
    gemm2: Callable[..., Tensor]
    activations: Sequence[str]  # all that gemm1 computes
    few_activations: Sequence[str]  # where one with a gate, and one without, stand for all
    formats: Sequence[WeightFormat]
    tile_rows: Sequence[int]
    few_tile_rows: Sequence[int]  # where one or two of them stand for all
    format_tile_rows: Sequence[int]  # with which every format is tried
    format_dims: Sequence[Dims]  # those that a format cannot have are left out
    awkward_dims: Sequence[Dims]  # multiples of 8 and of nothing else
    awkward_formats: Sequence[WeightFormat]
    usual_dims: Dims
    usual_formats: Sequence[WeightFormat]
    loads: Mapping[str, Sequence[int]]  # rows of each expert, by name; "edges_of_tiles" and "several_tiles" among them
    options: Mapping[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    bias_dtypes: Sequence[torch.dtype] = ()  # those of the biases that both take
    bias_dims: Sequence[Dims] | None = None  # with which biases are tried in every format; None: format_dims
    reads_padding_tokens: bool = True  # token_of_row of padding rows must be -1, as the planner leaves it

    def problems(self, all_dims: Sequence[Dims], formats: Sequence[WeightFormat]) -> Iterator[Problem]:
        """gemm1 with few activations, and gemm2, of these dims in these formats where dims and format agree."""
        for activation in (*self.few_activations, None):
            for dims in all_dims:
                is_gated = activation is not None and ActivationType[activation].is_gated
                weight_rows = dims[1] * (2 if is_gated else 1)
                for weight_format in formats:
                    if not (weight_format.is_shuffled and weight_rows % SHUFFLE_ROWS):
                        yield Problem(activation, dims, weight_format)

    def case(self, problem: Problem, *, loads: Sequence[int] | None = None, **arguments: Any) -> GemmCase:
        """A case of this problem; with `loads`, expert e has loads[e] rows."""
        if loads is not None:
            ids = ids_of_loads(loads, seed=arguments.get("seed", 0))
            arguments |= {"expert_ids": ids, "num_experts": len(loads)}
        in_features, out_features = problem.dims
        return make_case(
            in_features=in_features,
            out_features=out_features,
            activation=problem.activation,
            weight_format=problem.weight_format,
            padding_token=-1 if self.reads_padding_tokens else GARBAGE,
            **arguments,
        )

    def run(self, case: GemmCase, swiglu: SwigluParams | None = None, **options: Any) -> Tensor:
        tensors = (case.rows, case.weights, case.permutation)
        if case.bias is not None:
            options["bias"] = case.bias
        if case.config.activation is None:
            return self.gemm2(*tensors, config=case.config, **options)
        return self.gemm1(*tensors, config=case.config, swiglu=swiglu, **options)

    def assert_is_close(self, case: GemmCase, swiglu: SwigluParams | None = None, **options: Any) -> None:
        exact, reference = case.exact(swiglu), case.by_slot(run_reference(case, swiglu))
        actual = case.by_slot(self.run(case, swiglu, **options))
        assert_close_to_exact(actual.flatten(0, 1), reference.flatten(0, 1), exact.flatten(0, 1))


def activations_of(family: GemmKernel) -> list[str]:
    return [activation.name for activation in ACTIVATIONS[family]]


def run_reference(case: GemmCase, swiglu: SwigluParams | None = None) -> Tensor:
    tensors = (case.rows, case.weights, case.permutation)
    if case.config.activation is None:
        return grouped_gemm_reference(*tensors, config=case.config, bias=case.bias)
    return gather_gemm_reference(*tensors, config=case.config, swiglu=swiglu, bias=case.bias)


# Arguments of the contract's tests -> what a family runs them with, and how that reads.
AXES: dict[str, tuple[Callable[[Family], Sequence[Any]], Callable[[Any], str] | None]] = {
    "tile_rows": (lambda family: family.tile_rows, "tile_rows{}".format),
    "few_tile_rows": (lambda family: family.few_tile_rows, "tile_rows{}".format),
    "format_tile_rows": (lambda family: family.format_tile_rows, "tile_rows{}".format),
    "in_any_format": (lambda family: list(family.problems(family.format_dims, family.formats)), str),
    "biased_in_any_format": (
        lambda family: list(family.problems(family.bias_dims or family.format_dims, family.formats)),
        str,
    ),
    "awkward": (lambda family: list(family.problems(family.awkward_dims, family.awkward_formats)), str),
    "usual": (lambda family: list(family.problems([family.usual_dims], family.usual_formats)), str),
    "usual_format": (lambda family: family.usual_formats, format_id),
    "load": (lambda family: list(family.loads), str),
    "any_activation": (lambda family: family.activations, str),
    "bias_dtype": (lambda family: family.bias_dtypes, str),
    "option": (lambda family: list(family.options), str),
}
