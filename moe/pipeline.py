"""The layer: five callables in a row. This file is the architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from moe.checks import expect, expect_separate, is_as_expected
from moe.config import MoEConfig
from moe.flow import ExpertOutputs, Permutation, SwigluParams, TopK
from moe.gemm.checks import check_swiglu, check_weights
from moe.gemm.reference import gather_gemm_reference, grouped_gemm_reference
from moe.permute.reference import finalize_tokens_reference, plan_permutation_reference
from moe.routing.reference import select_experts_reference
from moe.stages import Finalizer, Gemm1, Gemm2, Permuter, Router

ALLOCATION_BYTES = 512  # torch's CUDA allocator rounds every tensor up to a multiple of this


@dataclass(frozen=True)
class FusedExperts:
    """One callable that does the work of stages 2 to 5 for few tokens, and the stages that it stands for.

    It steps aside when any of those stages is swapped, and where the caller stops before finalize.
    """

    run: Callable[..., Tensor]  # (topk, hidden_states, w1, w2, *, swiglu, output) -> [T, H] bfloat16
    max_tokens: int
    stands_for: tuple[Permuter, Gemm1, Gemm2, Finalizer]
    launch: Callable[..., Tensor] | None = None  # `run` without its checks, where a pipeline has made them
    checked_by: MoEConfig | None = None  # the config of such a pipeline
    routed_by: Router | None = None  # the router whose experts need no check


@dataclass(frozen=True)
class MoEPipeline:
    """A bf16 MoE layer: route -> permute -> gemm1 -> gemm2 -> finalize.

    Enter with logits (`pipeline(...)`, `expert_outputs`) or with chosen experts (`run_experts`,
    `run_experts_unfinalized`); leave with tokens, or before finalize with rows, weights and map.
    Any stage is swapped with `dataclasses.replace(pipeline, gemm1=mine)`. For few tokens `fused` may stand for stages 2 to 5.

    Every entry checks all of its tensors before the first stage runs, and raises TypeError (not a tensor) or ValueError
    (naming the tensor, what was wanted, what came and the cure). So it does with what gemm2 and finalize return. Stages that take
    other tensors than `config` says go with `replace(pipeline, checks_inputs=False, ...)`, and check for themselves.

    Shapes: logits [T, E] float32 or bfloat16, bias [E] bfloat16 or float32, hidden_states [T, H] bfloat16,
    w1 and w2 bfloat16 in `config.gemm1.weight_shape` and `config.gemm2.weight_shape`.
    Forward only: no gradient is recorded.
    """

    config: MoEConfig
    route: Router
    permute: Permuter
    gemm1: Gemm1
    gemm2: Gemm2
    finalize: Finalizer
    checks_inputs: bool = True
    fused: FusedExperts | None = None

    def __call__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
    ) -> Tensor:
        """logits and hidden_states -> [T, H] bfloat16, in `output` where given.

        Args:
            swiglu: per-expert parameters of the activation.
            output: [T, H] bfloat16 memory of its own to write.
            routing_replay_out: [>=T, K] int16; rows [0, T) receive the chosen global ids.
        """
        self._check(
            logits, hidden_states, w1, w2, swiglu, bias=bias, output=output, routing_replay_out=routing_replay_out
        )
        topk = self.route(logits, bias, replay_out=routing_replay_out)
        if topk.expert_ids.shape[0] <= self._max_fused_tokens:
            return self._run_routed(topk, hidden_states, w1, w2, swiglu=swiglu, output=output)
        return self._chain(topk, hidden_states, w1, w2, swiglu, output)

    def expert_outputs(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        bias: Tensor | None = None,
        swiglu: SwigluParams | None = None,
        routing_replay_out: Tensor | None = None,
    ) -> ExpertOutputs:
        """The same, stopped before finalize."""
        self._check(logits, hidden_states, w1, w2, swiglu, bias=bias, routing_replay_out=routing_replay_out)
        topk = self.route(logits, bias, replay_out=routing_replay_out)
        rows, permutation = self._rows(topk, hidden_states, w1, w2, swiglu)
        return ExpertOutputs(rows, topk.weights, permutation.row_of_slot)

    def run_experts(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        *,
        swiglu: SwigluParams | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """The same from chosen experts. Ids that are not local, or no expert's, are skipped."""
        self._check(topk, hidden_states, w1, w2, swiglu, output=output, is_chosen=True)
        if topk.expert_ids.shape[0] <= self._max_fused_tokens:
            return self._run_fused(topk, hidden_states, w1, w2, swiglu=swiglu, output=output)
        return self._chain(topk, hidden_states, w1, w2, swiglu, output)

    def run_experts_unfinalized(
        self, topk: TopK, hidden_states: Tensor, w1: Tensor, w2: Tensor, *, swiglu: SwigluParams | None = None
    ) -> ExpertOutputs:
        """The same from chosen experts, stopped before finalize."""
        self._check(topk, hidden_states, w1, w2, swiglu, is_chosen=True)
        rows, permutation = self._rows(topk, hidden_states, w1, w2, swiglu)
        return ExpertOutputs(rows, topk.weights, permutation.row_of_slot)

    def _chain(
        self,
        topk: TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        swiglu: SwigluParams | None,
        output: Tensor | None,
    ) -> Tensor:
        rows, permutation = self._rows(topk, hidden_states, w1, w2, swiglu)
        result = self.finalize(rows, topk, permutation, output=output)
        self._check_result("finalize", result, (hidden_states.shape[0], self.config.hidden_size))
        return result

    def _rows(
        self, topk: TopK, hidden_states: Tensor, w1: Tensor, w2: Tensor, swiglu: SwigluParams | None
    ) -> tuple[Tensor, Permutation]:
        permutation = self.permute(topk)
        activation = self.gemm1(hidden_states, w1, permutation, swiglu=swiglu)
        rows = self.gemm2(activation, w2, permutation)
        self._check_result("gemm2", rows, (permutation.max_rows, self.config.hidden_size))
        return rows, permutation

    def _check_result(self, stage: str, result: Tensor, shape: tuple[int, int]) -> None:
        """Raise unless a stage returned bf16 of this shape."""
        if self.checks_inputs and not is_as_expected(result, shape, torch.bfloat16):
            expect(f"result of {stage}", result, f"{shape[0]} {shape[1]}", {}, dtype=torch.bfloat16)

    @functools.cached_property
    def _max_fused_tokens(self) -> int:
        """Up to how many tokens `fused` runs; -1 where it steps aside."""
        stages = (self.permute, self.gemm1, self.gemm2, self.finalize)
        if self.fused is None or any(stage is not other for stage, other in zip(stages, self.fused.stands_for)):
            return -1
        return self.fused.max_tokens

    @functools.cached_property
    def _run_fused(self) -> Callable[..., Tensor]:
        """`fused` for tensors that passed `_check`, the chosen experts among them."""
        fused = self.fused
        assert fused is not None
        is_checked = self.checks_inputs and self.config is fused.checked_by
        return fused.launch if fused.launch and is_checked else fused.run

    @functools.cached_property
    def _run_routed(self) -> Callable[..., Tensor]:
        """`fused` for tensors that passed `_check`, and experts that `route` chose."""
        assert self.fused is not None
        return self._run_fused if self.route is self.fused.routed_by else self.fused.run

    def workspace_bytes(self, num_tokens: int) -> int:
        """Upper bound in bytes on what a call over `num_tokens` tokens allocates beside its [T, H] output.

        Scratch of both GEMMs (P rows of I and of H), the top-k, the index arrays and the permutation's counts, each
        rounded up as torch's CUDA allocator does. Nothing grows with the weights. For the pipeline of our kernels; the
        references on a CPU also hold one expert's weights in float32 at a time.

        Raises:
            ValueError: a negative number, or more tokens than rows can be numbered for.
        """
        config = self.config
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected 0 or more, got {num_tokens}; pass the largest batch's")
        config.permute.check_num_tokens(num_tokens)
        rows = config.permute.max_rows(num_tokens)
        slots = num_tokens * config.top_k
        tiles = rows // config.permute.rows_per_tile(num_tokens)
        sizes = [
            rows * config.intermediate_size * 2,
            rows * config.hidden_size * 2,
            slots * 4,  # expert_ids
            slots * 4,  # weights, float32 at most
            slots * 4,  # row_of_slot
            rows * 4,  # token_of_row
            tiles * 4,  # expert_of_tile
            tiles * 4,  # row_limit_of_tile
            4,  # num_rows
            4,  # num_tiles
            *(tiles * 20, 8) * 2,  # what Hopper's GEMMs make of the tiles: five numbers each, and two counts
            config.permute.scratch_bytes(num_tokens) + ALLOCATION_BYTES,  # two tensors
        ]
        return sum(-(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES for size in sizes)

    def _check(
        self,
        entry: Tensor | TopK,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        swiglu: SwigluParams | None,
        *,
        bias: Tensor | None = None,
        output: Tensor | None = None,
        routing_replay_out: Tensor | None = None,
        is_chosen: bool = False,
    ) -> None:
        """Raise unless all tensors fit the config. `entry` is the logits, or the experts chosen already (`is_chosen`)."""
        if not self.checks_inputs:
            return
        config = self.config
        weights = None
        if is_chosen:
            topk = cast(TopK, entry)
            config.permute.check(topk)
            first, first_name, weights = topk.expert_ids, "expert_indices", topk.weights
        else:
            first, first_name = cast(Tensor, entry), "routing_logits"
            config.routing.check(first, bias, routing_replay_out)
        device, num_tokens = first.device, first.shape[0]
        if not is_as_expected(hidden_states, (num_tokens, config.hidden_size), torch.bfloat16, device):
            words = {
                "dtype": "BF16 MoE: hidden_states must be bfloat16.",
                "T": f"{first_name} and hidden_states must have the same number of tokens.",
            }
            dims = {"T": num_tokens, "H": config.hidden_size}
            expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device, words=words)
        config.permute.check_num_tokens(num_tokens)
        check_weights(config.gemm1, "gemm1_weights", w1, device)
        check_weights(config.gemm2, "gemm2_weights", w2, device)
        check_swiglu(config.gemm1, swiglu, device)
        parameters = () if swiglu is None else (swiglu.alpha, swiglu.beta, swiglu.clamp_limit)
        needs_gradient = _needs_gradient(first, hidden_states, w1, w2, bias, weights, *parameters)
        if output is None and routing_replay_out is None and not needs_gradient:
            return
        read = {first_name: first, "routing_bias": bias, "expert_weights": weights}
        read |= {"hidden_states": hidden_states, "gemm1_weights": w1, "gemm2_weights": w2}
        read |= zip(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"), parameters)
        if output is not None:
            dims = {"T": num_tokens, "H": config.hidden_size}
            expect("output", output, "T H", dims, dtype=torch.bfloat16, device=device)
            expect_separate("output", output, read | {"routing_replay_out": routing_replay_out})
            needs_gradient = needs_gradient or _needs_gradient(output)
        if routing_replay_out is not None:
            expect_separate("routing_replay_out", routing_replay_out, read)
        if needs_gradient:
            _refuse_gradient(read | {"output": output})


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _refuse_gradient(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got requires_grad=True; the layer is forward only: "
                "call it under torch.no_grad() or torch.inference_mode(), or pass .detach()"
            )


def reference_pipeline(config: MoEConfig) -> MoEPipeline:
    """The layer in plain torch, on any device: what defines the right result, and the CPU backend."""
    return MoEPipeline(
        config,
        route=partial(select_experts_reference, config=config.routing),
        permute=partial(plan_permutation_reference, config=config.permute),
        gemm1=partial(gather_gemm_reference, config=config.gemm1),
        gemm2=partial(grouped_gemm_reference, config=config.gemm2),
        finalize=partial(finalize_tokens_reference, config=config.finalize),
    )


def build_pipeline(config: MoEConfig, device: torch.device | str, *, uses_pdl: bool = True) -> MoEPipeline:
    """The layer for a device: our kernels on CUDA, the references elsewhere and for whatever a kernel does not take.

    Args:
        device: "cuda", "cpu" or one of them; the pipeline runs where its tensors lie.
        uses_pdl: programmatic dependent launches where kernels and GPU (compute capability 9.0 and up) have them. No
            effect on the result.

    Example:
        >>> config = MoEConfig.create(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
        >>> pipeline = build_pipeline(config, "cuda")
        >>> output = pipeline(logits, hidden_states, w1, w2)
    """
    if torch.device(device).type != "cuda":
        return reference_pipeline(config)
    # Here and not above: `import moe` needs neither triton nor numba, and a CPU pipeline neither.
    from moe.fused.few_tokens import config as few_tokens
    from moe.fused.few_tokens.experts import few_token_experts, launch_few_token_experts
    from moe.gemm.kernels import run_gemm1, run_gemm2, unit_size
    from moe.permute import numba_plan
    from moe.permute.finalize import finalize_tokens
    from moe.permute.triton_plan import plan_permutation
    from moe.routing.topk import select_experts, takes

    permute = partial(plan_permutation, config=config.permute)
    if numba_plan.takes(config.permute):
        size = partial(unit_size, gemm1=config.gemm1, gemm2=config.gemm2)
        permute = partial(numba_plan.numba_plan_permutation, config=config.permute, uses_pdl=uses_pdl, unit_size=size)
    gemm1 = partial(run_gemm1, config=config.gemm1, uses_pdl=uses_pdl)
    gemm2 = partial(run_gemm2, config=config.gemm2, uses_pdl=uses_pdl)
    finalize = partial(finalize_tokens, config=config.finalize, uses_pdl=uses_pdl)
    router = partial(select_experts, uses_pdl=uses_pdl) if takes(config.routing) else select_experts_reference
    route = partial(router, config=config.routing)
    fused = None
    if config.few_tokens.max_tokens != 0 and few_tokens.takes(config.gemm1, config.gemm2):
        few = few_tokens.FewTokenConfig(
            num_experts=config.num_experts,
            top_k=config.top_k,
            gemm1=config.gemm1,
            gemm2=config.gemm2,
            local_expert_offset=config.permute.local_expert_offset,
            slot_tile=config.few_tokens.slot_tile,
            token_tile=config.few_tokens.token_tile,
            uses_pdl=uses_pdl,
        )
        fused = FusedExperts(
            partial(few_token_experts, config=few),
            config.few_tokens.max_tokens or few.max_tokens,
            stands_for=(permute, gemm1, gemm2, finalize),
            launch=partial(launch_few_token_experts, config=few),
            checked_by=config,
            routed_by=route,
        )
    return MoEPipeline(
        config,
        route=route,
        permute=permute,
        gemm1=gemm1,
        gemm2=gemm2,
        finalize=finalize,
        fused=fused,
    )
