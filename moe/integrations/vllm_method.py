"""What vLLM makes of an unquantised MoE layer while the plug-in is on. vLLM's dispatch and combination stay around it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from moe.gemm.config import ActivationType
from moe.integrations.engine_layer import EngineLayer, call_layer, local_ids, why_not
from moe.integrations.hf_experts import Gate
from moe.integrations.vllm import refuses_others

logger = init_logger("vllm.moe_stages")  # below vllm's own, whose handler prints
_ACTIVATIONS = {
    MoEActivation.SILU: ActivationType.Swiglu,
    MoEActivation.SWIGLUOAI: ActivationType.Swiglu,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ActivationType.Swiglu,
    MoEActivation.SWIGLUSTEP: ActivationType.SwigluStep,
    MoEActivation.SITU: ActivationType.Situ,
    MoEActivation.GELU: ActivationType.Geglu,
    MoEActivation.GELU_TANH: ActivationType.GegluTanh,
    MoEActivation.SILU_NO_MUL: ActivationType.Silu,
    MoEActivation.GELU_NO_MUL: ActivationType.Gelu,
    MoEActivation.RELU2_NO_MUL: ActivationType.Relu2,
}
# Numbers that vLLM's kernels have, whatever a layer says.
_FIXED = {MoEActivation.SWIGLUOAI: Gate(1.702, 1.0, 7.0), MoEActivation.SWIGLUSTEP: Gate(clamp_limit=7.0)}
_SAID: set[tuple[str, str]] = set()


def register_method() -> None:
    """Put our method in the place of UnquantizedFusedMoEMethod.

    Raises:
        RuntimeError: another plug-in has taken that place.
    """
    name = UnquantizedFusedMoEMethod.__name__
    other = op_registry_oot.get(name)
    if other is MoeStagesMethod:
        return
    if other is not None:
        raise RuntimeError(
            f"moe_stages: expected to be the only plug-in for {name}, but {other.__module__} is one; unset MOE_VLLM, or name the "
            "plug-ins to load in VLLM_PLUGINS"
        )
    UnquantizedFusedMoEMethod.register_oot(MoeStagesMethod)


class MoeStagesMethod(UnquantizedFusedMoEMethod):
    """vLLM's method with our experts, where they compute the layer; else vLLM's as it is."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.why_not_ours = why_not_ours(moe)
        if self.why_not_ours is None:
            # Before sizes are rounded and weights are made: this one leaves both as they are in a checkpoint.
            self.unquantized_backend = UnquantizedMoeBackend.TRITON
            self.experts_cls = MoeStagesExperts

    def create_weights(self, layer: torch.nn.Module, *args: Any, **more: Any) -> None:
        """As vLLM's; here the layer's name is known, and nothing has been allocated yet."""
        name = getattr(layer, "layer_name", "") or "a MoE layer"
        if self.why_not_ours is None:
            _expect_weights_like_tokens(name, more.get("params_dtype"))
            _say_once("runs", layer_of(self.moe).words, name)
        elif refuses_others():
            raise NotImplementedError(
                f"{name}: {self.why_not_ours}; moe_stages does not compute it: set MOE_VLLM=1 to leave such layers to vLLM"
            )
        else:
            _say_once("stays", self.why_not_ours, name)
        super().create_weights(layer, *args, **more)


def _expect_weights_like_tokens(name: str, dtype: torch.dtype | None) -> None:
    """Sizes have been rounded for us by now, so such a layer is not left to vLLM, whose kernels take no two types either."""
    if dtype not in (None, torch.bfloat16):
        raise NotImplementedError(
            f"{name}: params_dtype: expected bfloat16, as tokens, got {str(dtype).removeprefix('torch.')}; unset MOE_VLLM"
        )


def _say_once(what: str, words: str, name: str) -> None:
    """One line for all layers alike."""
    if (what, words) in _SAID:
        return
    _SAID.add((what, words))
    if what == "runs":
        logger.info(
            "moe_stages %s runs the experts of %s, and of layers like it: %s", version("moe-stages"), name, words
        )
    else:
        logger.warning("moe_stages leaves %s, and layers like it, to vLLM: %s", name, words)


def why_not_ours(moe: FusedMoEConfig) -> str | None:
    """The field of a layer that keeps it with vLLM, what was wanted and what came; None for a layer of ours."""
    if moe.moe_backend != "auto":
        return f"moe_backend: expected auto, got {moe.moe_backend}, which was asked for"
    if moe.is_lora_enabled:
        return "is_lora_enabled: expected False, got True; adapters of experts are vLLM's"
    if moe.activation not in _ACTIVATIONS:
        wanted = ", ".join(activation.value for activation in _ACTIVATIONS)
        return f"activation: expected one of {wanted}, got {moe.activation.value}"
    if moe.activation is not MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        for name, plain in (("swiglu_alpha", 1.0), ("swiglu_beta", 0.0)):
            if getattr(moe, name) not in (None, plain):
                return f"{name}: expected None with {moe.activation.value}, got {getattr(moe, name)}"
    takes_limit = (MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE)
    if moe.activation not in takes_limit and moe.swiglu_limit is not None:
        return f"swiglu_limit: expected None with {moe.activation.value}, got {moe.swiglu_limit}"
    for name in ("activation_situ_beta", "activation_situ_linear_beta"):
        if moe.activation is MoEActivation.SITU and getattr(moe, name) is None:
            return f"{name}: expected a number with situ, got None"
    form = mk.FusedMoEActivationFormat.Standard
    is_supported, reason = MoeStagesExperts.is_supported_config(MoeStagesExperts, moe, None, None, form)
    if not is_supported:
        return str(reason)
    return why_not(layer_of(moe, _numbers_of(moe)), moe.in_dtype, torch.device(moe.device))


def _numbers_of(moe: FusedMoEConfig) -> Gate:
    """What is known of the gate before the layer is built."""
    if moe.activation is MoEActivation.SITU:
        return Gate(moe.activation_situ_beta, moe.activation_situ_linear_beta)
    return Gate(clamp_limit=moe.swiglu_limit)


def layer_of(moe: FusedMoEConfig, gate: Gate = Gate()) -> EngineLayer:
    """The layer of experts that vLLM describes, by our names."""
    return EngineLayer(
        moe.hidden_dim,
        moe.intermediate_size_per_partition,
        moe.num_local_experts,
        moe.experts_per_token,
        _ACTIVATIONS[moe.activation],
        gate,
        bool(envs.VLLM_BATCH_INVARIANT),
        is_interleaved=moe.activation is MoEActivation.SWIGLUOAI,
    )


def gate_of(activation: MoEActivation, numbers: Any) -> Gate:
    """What vLLM's ApplyMoEActivationConfig says of a gate."""
    if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        return Gate(numbers.alpha, numbers.beta, numbers.clamp_limit)
    if activation is MoEActivation.SITU:
        return Gate(numbers.activation_situ_beta, numbers.activation_situ_linear_beta)
    return _FIXED.get(activation, Gate(clamp_limit=numbers.clamp_limit))


class MoeStagesExperts(mk.FusedMoEExpertsModular):
    """vLLM's word for what lies between dispatch and combination: permute, gemm1, gemm2 and finalize of ours."""

    def __init__(self, moe_config: FusedMoEConfig, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        self.layer = layer_of(moe_config, gate_of(moe_config.activation, self.activation_config))

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cuda() or current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        """Not where tokens come sorted by expert, quantised, or are sent by the experts themselves."""
        others = (
            "batched_activation_format",
            "fi_nvl_one_sided_kernels",
            "fi_nvl_two_sided_kernels",
            "moonep_kernels",
            "mori_kernels",
            "passthrough_all2all",
        )
        return not any(getattr(moe_parallel_config, f"use_{name}", False) for name in others)

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # layer_of asks for it under VLLM_BATCH_INVARIANT

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """None of vLLM's: scratch comes from torch's allocator, of a size that follows from M, so warm-up has seen the largest."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the sum of this rank's experts for each token to `output` [T, H]; zeros where none of a token's is here.

        Raises:
            NotImplementedError: a hook that wants the rows of experts unsummed, which a model may set once the layer is built.
        """
        if getattr(self, "post_gemm2_hook", None) is not None:
            raise NotImplementedError("moe_stages: post_gemm2_hook: expected None, got a function; unset MOE_VLLM")
        if apply_router_weight_on_input:  # vLLM's prepare has multiplied the tokens
            topk_weights = torch.ones_like(topk_weights)
        ids = local_ids(topk_ids, expert_map)
        biases = (self.quant_config.w1_bias, self.quant_config.w2_bias)
        call_layer(self.layer, hidden_states, ids, topk_weights, w1, w2, output, biases)
