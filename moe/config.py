"""MoEConfig: one config a stage, and what the stages must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from moe.base_config import FrozenConfig, Names, plain_error
from moe.checks import no_case
from moe.fused.few_tokens.config import FewTokenTiles
from moe.gemm.config import PARAMETERS, ActivationType, GemmConfig, SwigluNumbers, WeightFormat, named_activations
from moe.hf_config import layer_fields
from moe.permute.config import MIN_TILE_ROWS, FinalizeConfig, PermuteConfig
from moe.routing.config import RoutingConfig, RoutingMethod

WeightOn = Literal["output", "input"]
SPARSE_SHARE = 4  # of so many slots or more one has a row: measured, branching over the others wins from here on


class MoEConfig(FrozenConfig):
    """A whole layer. `MoEConfig.create` fills it from a layer's usual numbers."""

    routing: RoutingConfig
    permute: PermuteConfig
    gemm1: GemmConfig
    gemm2: GemmConfig
    finalize: FinalizeConfig = FinalizeConfig()
    few_tokens: FewTokenTiles = FewTokenTiles()  # what may stand for permute to finalize
    swiglu: SwigluNumbers | None = None  # the activation's numbers in calls that give none
    has_biases: bool = Field(default=False, strict=True)  # whether a call without biases of both GEMMs is refused
    # What of an expert a routing weight is multiplied with: with its input, bf16(w * x) goes in, as in Llama 4.
    weight_on: WeightOn = "output"

    @classmethod
    def create(
        cls,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        method: RoutingMethod | int | str = RoutingMethod.RENORMALIZE,
        n_group: int = 0,
        topk_group: int = 0,
        routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True,
        activation: ActivationType | int | str = ActivationType.Swiglu,
        weight_format: WeightFormat = WeightFormat(),
        local_expert_offset: int = 0,
        num_local_experts: int | None = None,
        tile_rows: int | None = None,
        is_batch_invariant: bool = False,
        swiglu: SwigluNumbers | None = None,
        has_biases: bool = False,
        weight_on: WeightOn = "output",
    ) -> MoEConfig:
        """The config of a layer: H=hidden_size, I=intermediate_size an expert, E=num_experts, K=top_k.

        Args:
            is_batch_invariant: on a GPU, a token alone has the bits that it has in any batch: one kind of kernel with one
                tile for every number of tokens, so slower with few tokens and with very many. The references sum as
                torch's matmul does, on a CPU in an order that may follow the number of rows.
            swiglu: alpha, beta and clamp_limit of all experts, in calls that give no `SwigluParams`.
            has_biases: refuse calls that leave a bias out. Without it a call may bring biases or none.
            weight_on: "input" multiplies each routing weight into its expert's input, rounded to bfloat16, and weighs no result:
                Llama 4, and what engines call apply_router_weight_on_input.

        Raises:
            ValueError: naming the argument, what was wanted and what came.
        """
        fields = stage_fields(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            top_k=top_k,
            method=method,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=routed_scaling_factor,
            norm_topk_prob=norm_topk_prob,
            activation=activation,
            weight_format=weight_format,
            local_expert_offset=local_expert_offset,
            num_local_experts=num_local_experts,
            tile_rows=tile_rows,
            is_batch_invariant=is_batch_invariant,
        )
        fields |= {"swiglu": swiglu, "has_biases": has_biases, "weight_on": weight_on}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise plain_error(error, NAMES_OF_FIELDS) from None

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any] | Any,
        *,
        layer: int | None = None,
        weight_format: WeightFormat | None = None,
        local_expert_offset: int = 0,
        num_local_experts: int | None = None,
        tile_rows: int | None = None,
        is_batch_invariant: bool = False,
    ) -> MoEConfig:
        """The config of the MoE layers that a Hugging Face config.json describes.

        Args:
            config: the content of config.json, or a transformers config; `moe.hf_config.FAMILIES` lists the model
                types that are known. Where it has a `text_config`, that is read.
            layer: which layer, counted from 0; None for all, where they are alike.
            weight_format: how the weights that the layer is given lie; None: as transformers holds them.
            is_batch_invariant: as in `create`.

        Raises:
            TypeError: neither.
            ValueError: an unknown model_type, a key that is missing, layers that differ, a layer without experts, or one
                that this package does not compute.

        Example:
            >>> MoEConfig.from_hf_config(json.load(open("config.json")))
        """
        fields = layer_fields(config, layer)
        if weight_format is not None:
            fields["weight_format"] = weight_format
        return cls.create(
            **fields,
            local_expert_offset=local_expert_offset,
            num_local_experts=num_local_experts,
            tile_rows=tile_rows,
            is_batch_invariant=is_batch_invariant,
        )

    @model_validator(mode="after")
    def _stages_agree(self) -> MoEConfig:
        pairs = (
            ("routing.num_experts", "permute.num_experts"),
            ("routing.top_k", "permute.top_k"),
            ("permute.num_local_experts", "gemm1.num_experts"),
            ("permute.num_local_experts", "gemm2.num_experts"),
            ("gemm1.out_features", "gemm2.in_features"),
            ("gemm1.in_features", "gemm2.out_features"),
        )
        for first, second in pairs:
            if self._at(first) != self._at(second):
                raise ValueError(
                    f"stages disagree: {first}={self._at(first)} but {second}={self._at(second)}; make them equal"
                )
        if self.gemm1.activation is None:
            raise ValueError(f"gemm1.activation: expected {named_activations()}, got None; name the activation")
        taken, given = PARAMETERS.get(self.gemm1.activation, ()), self.swiglu.given if self.swiglu else ()
        if any(name not in taken for name in given):
            raise ValueError(
                f"swiglu: expected {' and '.join(taken) or 'none'} with {self.gemm1.activation.name}, got {' and '.join(given)}; "
                "leave out what the activation does not take"
            )
        if self.gemm2.activation is not None:
            raise ValueError(
                f"gemm2.activation: expected None, got {self.gemm2.activation.name}; gemm2 has no activation"
            )
        return self

    def _at(self, path: str) -> Any:
        stage, field = path.split(".")
        return getattr(getattr(self, stage), field)

    @property
    def weighs_input(self) -> bool:
        if self.weight_on == "input":
            return True
        if self.weight_on == "output":
            return False
        raise no_case(self.weight_on, "moe/config.py, MoEConfig.weighs_input")

    @property
    def planned(self) -> PermuteConfig:
        """What stage 2 plans by. Slots whose inputs are weighed are rows of their own: tokens with one choice."""
        return self.permute.model_copy(update={"top_k": 1}) if self.weighs_input else self.permute

    @property
    def summed(self) -> FinalizeConfig:
        """What stage 5 sums by. In a slice of few experts most slots have no row."""
        is_slice = self.permute.num_local_experts * SPARSE_SHARE <= self.num_experts
        if not is_slice or self.finalize.is_sparse is not None:
            return self.finalize
        return self.finalize.model_copy(update={"is_sparse": True})

    @property
    def hidden_size(self) -> int:
        return self.gemm1.in_features

    @property
    def intermediate_size(self) -> int:
        return self.gemm1.out_features

    @property
    def num_experts(self) -> int:
        return self.routing.num_experts

    @property
    def top_k(self) -> int:
        return self.routing.top_k


_TOP_K = ("top_k", "top_k must be between 1 and num_experts: ")
_LOCAL = ("num_local_experts", "local_num_experts must be between 1 and num_experts: ")
NAMES_OF_FIELDS: Names = {
    ("routing", "top_k"): _TOP_K,
    ("permute", "top_k"): _TOP_K,
    ("permute", "num_local_experts"): _LOCAL,
    ("gemm1", "num_experts"): _LOCAL,
    ("gemm2", "num_experts"): _LOCAL,
    ("permute", "local_expert_offset"): ("local_expert_offset", "expert offset and count must be within valid range: "),
    ("gemm1", "in_features"): ("hidden_size", ""),
    ("gemm2", "out_features"): ("hidden_size", ""),
    ("gemm1", "out_features"): ("intermediate_size", ""),
    ("gemm2", "in_features"): ("intermediate_size", ""),
}


def stage_fields(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    method: RoutingMethod | int | str,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    activation: ActivationType | int | str,
    weight_format: WeightFormat,
    local_expert_offset: int,
    num_local_experts: int | None,
    tile_rows: int | None = None,
    is_batch_invariant: bool = False,
) -> dict[str, Any]:
    """What a MoEConfig is validated from, by a layer's usual numbers; `NAMES_OF_FIELDS` leads back to them."""
    local = num_experts if num_local_experts is None else num_local_experts
    fields: dict[str, Any] = {
        "routing": {
            "num_experts": num_experts,
            "top_k": top_k,
            "method": method,
            "n_group": n_group,
            "topk_group": topk_group,
            "routed_scaling_factor": routed_scaling_factor,
            "norm_topk_prob": norm_topk_prob,
        },
        "permute": {
            "num_experts": num_experts,
            "num_local_experts": local,
            "top_k": top_k,
            "local_expert_offset": local_expert_offset,
            "tile_rows": tile_rows,
        },
        "gemm1": {
            "num_experts": local,
            "in_features": hidden_size,
            "out_features": intermediate_size,
            "activation": activation,
            "weight_format": weight_format,
        },
        "gemm2": {
            "num_experts": local,
            "in_features": intermediate_size,
            "out_features": hidden_size,
            "weight_format": weight_format,
        },
    }
    if is_batch_invariant:
        fields["permute"]["tile_rows"] = tile_rows or MIN_TILE_ROWS
        fields["gemm1"]["kernel"] = fields["gemm2"]["kernel"] = "swapped"  # the portable one where it is not taken
        fields["few_tokens"] = {"max_tokens": 0}
    return fields
