"""Inputs of the GEMM tests, and their truth in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe.flow import Permutation, SwigluParams, TopK
from moe.gemm.config import ActivationType, GemmConfig, GemmTile, WeightFormat, WeightLayout
from moe.gemm.weight_format import pack_bias, pack_weights
from moe.permute.config import PermuteConfig
from moe.permute.reference import plan_permutation_reference
from moe.testing.problems import activated_in_float64

ALL_FORMATS = [
    WeightFormat(layout=layout, is_shuffled=is_shuffled, gate_up_order=order)
    for layout in WeightLayout
    for is_shuffled in (False, True)
    for order in ("gate_up", "up_gate", "interleaved")
    if not (is_shuffled and order == "interleaved")
]
UNGATED_FORMATS = [form for form in ALL_FORMATS if form.gate_up_order == "gate_up"]  # there is no order without up
GARBAGE = 1 << 30
ABSENT_IDS = (-1, 1 << 30, 2**31 - 1, -(2**31))


def format_id(weight_format: WeightFormat) -> str:
    shuffled = "-shuffled" if weight_format.is_shuffled else ""
    return f"{weight_format.layout.name}{shuffled}-{weight_format.gate_up_order}"


@dataclass(frozen=True)
class GemmCase:
    """One GEMM's inputs: rows [T, H] for gemm1 and [P, I] for gemm2, the weights packed and logical."""

    config: GemmConfig
    rows: Tensor  # bf16
    weights: Tensor  # bf16, config.weight_shape
    logical: Tensor  # bf16 [E_local, N, K], gate rows first
    permutation: Permutation
    expert_ids: Tensor  # [T, K] int32, local ids where local
    bias: Tensor | None = None  # [E_local, N], in the order of the weights' rows
    logical_bias: Tensor | None = None  # the same, gate first

    def exact(self, swiglu: SwigluParams | None = None) -> Tensor:
        """[T, K, out_features] float64 by slot; zeros where the expert is not local."""
        num_tokens, top_k = self.expert_ids.shape
        exact = torch.zeros(num_tokens, top_k, self.config.out_features, dtype=torch.float64, device=self.rows.device)
        for expert in range(self.config.num_experts):
            token, choice = (self.expert_ids == expert).nonzero(as_tuple=True)
            row = token if self.config.activation is not None else self.permutation.row_of_slot[token, choice].long()
            product = self.rows[row].double() @ self.logical[expert].double().T
            if self.logical_bias is not None:
                product += self.logical_bias[expert].double()
            activation = self.config.activation
            if activation is not None:
                product = activated_in_float64(product, activation, expert, swiglu)
            exact[token, choice] = product
        return exact

    def by_slot(self, out: Tensor) -> Tensor:
        """[P, out_features] -> [T, K, out_features]; zeros where the expert is not local."""
        is_local = self.permutation.row_of_slot >= 0
        return torch.where(is_local[..., None], out[self.permutation.row_of_slot.clamp(min=0).long()], 0)


def make_case(
    *,
    in_features: int,
    out_features: int,
    activation: ActivationType | str | None = None,
    num_tokens: int = 7,
    top_k: int = 2,
    num_experts: int = 3,
    tile_rows: int = 16,
    weight_format: WeightFormat = WeightFormat(),
    tile: GemmTile | None = None,
    expert_ids: Tensor | None = None,
    local: slice | None = None,
    is_integer: bool = False,
    padding_token: int = GARBAGE,
    bias_dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> GemmCase:
    """A case with distinct random experts a token, or those of `expert_ids`; `local` is this rank's slice of experts.

    What must not be read is poisoned: NaN in padding rows, garbage in token_of_row past num_rows and in the tile list past
    num_tiles. padding_token is what token_of_row has on padding rows before that, where the planner says -1. is_integer draws
    small integers and a first column of 32: products sum exactly in fp32, to numbers near 1024, of 11 bits where bf16 has 8,
    and so large that their sigmoid is 1. bias_dtype: with a bias that is as large as the products.
    """
    local = local or slice(0, num_experts)
    num_local = local.stop - local.start
    config = GemmConfig(
        num_experts=num_local,
        in_features=in_features,
        out_features=out_features,
        activation=activation,
        weight_format=weight_format,
        tile=tile,
    )
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if is_integer:
            return torch.randint(-3, 4, shape, generator=generator, device=device).to(torch.bfloat16)
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(torch.bfloat16)

    if expert_ids is None:
        expert_ids = torch.rand(num_tokens, num_experts, generator=generator, device=device).argsort(1)[:, :top_k]
    expert_ids = expert_ids.to(device=device, dtype=torch.int32).contiguous()
    permute_config = PermuteConfig(
        num_experts=num_experts,
        num_local_experts=num_local,
        top_k=expert_ids.shape[1],
        local_expert_offset=local.start,
        tile_rows=tile_rows,
    )
    topk = TopK(expert_ids, torch.ones(expert_ids.shape, device=device))
    permutation = poisoned(plan_permutation_reference(topk, config=permute_config), padding_token)
    logical = draw(num_local, config.weight_rows, in_features, scale=in_features**-0.5)
    rows = draw(len(expert_ids) if config.activation is not None else permutation.max_rows, in_features)
    if is_integer:
        logical[..., 0] = rows[:, 0] = 32
    if config.activation is None:
        is_padding = torch.ones(permutation.max_rows, dtype=torch.bool, device=device)
        is_padding[permutation.row_of_slot[permutation.row_of_slot >= 0].long()] = False
        rows[is_padding] = float("nan")
    bias = None if bias_dtype is None else draw(num_local, config.weight_rows).to(bias_dtype)
    return GemmCase(
        bias=None if bias is None else pack_bias(bias, weight_format, is_gated=config.is_gated),
        logical_bias=bias,
        config=config,
        rows=rows,
        weights=pack_weights(logical, weight_format, is_gated=config.is_gated),
        logical=logical,
        permutation=permutation,
        expert_ids=expert_ids - local.start,
    )


def ids_of_loads(loads: Sequence[int], *, seed: int = 0) -> Tensor:
    """[T, 2] expert ids in random order of which expert e comes loads[e] times, and some are no expert's."""
    absent = list(ABSENT_IDS[: 4 - sum(loads) % 2])
    ids = torch.tensor([expert for expert, load in enumerate(loads) for _ in range(load)] + absent)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))].view(-1, 2)


def poisoned(permutation: Permutation, padding_token: int) -> Permutation:
    def with_garbage_from(values: Tensor, first: int) -> Tensor:
        values = values.clone()
        values[first:] = GARBAGE
        return values

    num_tiles = int(permutation.num_tiles)
    token_of_row = permutation.token_of_row
    token_of_row = torch.where(token_of_row < 0, padding_token, token_of_row)
    return replace(
        permutation,
        token_of_row=with_garbage_from(token_of_row, int(permutation.num_rows)),
        expert_of_tile=with_garbage_from(permutation.expert_of_tile, num_tiles),
        row_limit_of_tile=with_garbage_from(permutation.row_limit_of_tile, num_tiles),
    )
