"""What SGLang runs a MoE layer by under --moe-runner-backend moe_stages. Its dispatch and combination stay around it."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

from moe.gemm.config import ActivationType
from moe.integrations.engine_layer import EngineLayer, call_layer, why_not
from moe.integrations.hf_experts import Gate

logger = logging.getLogger(__name__)
_NAME = "moe_stages"
_ACTIVATIONS = {  # by name and is_gated
    ("silu", True): ActivationType.Swiglu,
    ("gelu", True): ActivationType.Geglu,
    ("gelu_tanh", True): ActivationType.GegluTanh,
    ("situ", True): ActivationType.Situ,
    ("silu", False): ActivationType.Silu,
    ("gelu", False): ActivationType.Gelu,
    ("relu2", False): ActivationType.Relu2,
}
_SAID: set[str] = set()


class MoeStagesRunnerCore(DispatchMoeRunnerCore):
    """One layer's experts.

    Raises, when the layer is built:
        NotImplementedError: a layer that this package does not compute, naming it and the field.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        reason = why_not_ours(config)
        if reason is not None:
            raise NotImplementedError(
                f"MoE layer {config.layer_id}: {reason}; moe_stages does not compute it: leave out --moe-runner-backend {_NAME}"
            )
        self.layer = layer_of(config)
        if self.layer.words not in _SAID:
            _SAID.add(self.layer.words)
            words = "moe_stages %s runs the experts of MoE layer %s, and of layers like it: %s"
            logger.info(words, version("moe-stages"), config.layer_id, self.layer.words)

    @property
    def runner_backend(self) -> Any:
        return resolve_moe_runner_backend(_NAME)

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> Any:
        """The sum of this rank's experts for each token [T, H]; ids are this rank's, -1 for padding and another rank's.

        Raises:
            NotImplementedError: what only a call shows: rows that SGLang has put in turns itself, an adapter, another form of dispatch.
        """
        _expect_call(dispatch_output, quant_info, hooks)
        x, weights = dispatch_output.hidden_states, dispatch_output.topk_output.topk_weights
        scale = runner_config.routed_scaling_factor
        is_scaled = scale is not None and scale != 1.0
        if is_scaled and not self.layer.weighs_input:
            weights = weights.float() * scale
        matrices = (quant_info.w13_weight, quant_info.w2_weight)
        biases = (getattr(quant_info, "b13", None), getattr(quant_info, "b2", None))
        result = call_layer(self.layer, x, dispatch_output.topk_output.topk_ids, weights, *matrices, biases=biases)
        # Where weights go into the input, a scale is the output's all the same.
        return StandardCombineInput(result.mul_(scale) if is_scaled and self.layer.weighs_input else result)


def _expect_call(dispatch_output: Any, quant_info: Any, hooks: Any) -> None:
    if not dispatch_output.format.is_standard():
        raise NotImplementedError(
            f"moe_stages: expected the standard dispatch, got {dispatch_output.format}; use --moe-a2a-backend none"
        )
    if getattr(dispatch_output.topk_output, "topk_ids", None) is None:
        form = type(dispatch_output.topk_output).__name__
        raise NotImplementedError(
            f"moe_stages: topk_output: expected ids and weights, got {form}; leave out --moe-runner-backend {_NAME}"
        )
    if hooks is not None and any(getattr(hooks, name, None) is not None for name in ("after_gate_up", "after_down")):
        raise NotImplementedError("moe_stages: expected no adapters of experts (LoRA), got one; serve without them")
    if getattr(quant_info, "fuse_swiglu_interleaved", False):
        raise NotImplementedError(
            "moe_stages: fuse_swiglu_interleaved: expected False, got True; unset SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"
        )


def why_not_ours(config: MoeRunnerConfig) -> str | None:
    """The field of a layer that this package does not compute, what was wanted and what came; None for a layer of ours."""
    if (config.activation, config.is_gated) not in _ACTIVATIONS:
        return (
            "activation: expected silu, gelu, gelu_tanh or situ with is_gated, or silu, gelu or relu2 without, got "
            f"{config.activation}, is_gated={config.is_gated}"
        )
    for name in ("no_combine", "silu_mul_keep_fp32"):
        if getattr(config, name, False):
            return f"{name}: expected False, got True"
    reason = _why_not_gate(config)
    if reason is not None:
        return reason
    for name in ("hidden_size", "intermediate_size_per_partition", "num_local_experts"):
        if getattr(config, name) is None:
            return f"{name}: expected a number, got None"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return why_not(layer_of(config), config.params_dtype or torch.bfloat16, device)


def _why_not_gate(config: MoeRunnerConfig) -> str | None:
    """SGLang's words: alpha comes with a limit, and up + 1; a limit alone clamps after silu; swiglu_limit clamps before it.

    Of situ alpha is the gate's number, 4 where there is none, and the limit is up's.
    """
    numbers = {"gemm1_alpha": config.gemm1_alpha, "gemm1_clamp_limit": config.gemm1_clamp_limit}
    numbers["swiglu_limit"] = config.swiglu_limit
    if config.activation == "situ" and config.gemm1_clamp_limit is None:
        return "gemm1_clamp_limit: expected a number with situ, got None"
    if config.activation == "situ":
        return (
            None if config.swiglu_limit is None else f"swiglu_limit: expected None with situ, got {config.swiglu_limit}"
        )
    if not config.is_gated or config.activation != "silu":
        given = [name for name, value in numbers.items() if value is not None]
        return f"{given[0]}: expected None but for silu with a gate, got {numbers[given[0]]}" if given else None
    if config.gemm1_alpha is None:
        if getattr(config, "gemm1_beta", None) is not None:
            return f"gemm1_beta: expected None without gemm1_alpha, got {config.gemm1_beta}"
        if config.gemm1_clamp_limit is not None and config.swiglu_limit is not None:
            return "swiglu_limit: expected None with gemm1_clamp_limit, got both"
        return None
    if config.gemm1_clamp_limit is None or config.swiglu_limit is not None:
        return "gemm1_alpha: expected gemm1_clamp_limit with it, and no swiglu_limit"
    if getattr(config, "gemm1_beta", None) not in (None, 1.0):
        return f"gemm1_beta: expected None or 1, got {config.gemm1_beta}"
    return None


def layer_of(config: MoeRunnerConfig) -> EngineLayer:
    """The layer of experts that SGLang describes, by our names."""
    activation, gate = _ACTIVATIONS[config.activation, config.is_gated], Gate(clamp_limit=config.swiglu_limit)
    has_alpha = config.gemm1_alpha is not None
    if activation is ActivationType.Situ:
        gate = Gate(config.gemm1_alpha, config.gemm1_clamp_limit)
    elif has_alpha:
        gate = Gate(config.gemm1_alpha, 1.0, config.gemm1_clamp_limit)
    elif config.gemm1_clamp_limit is not None:
        activation, gate = ActivationType.SwigluStep, Gate(clamp_limit=config.gemm1_clamp_limit)
    more = {
        "weighs_input": bool(config.apply_router_weight_on_input),
        "is_interleaved": activation is ActivationType.Swiglu and has_alpha and bool(config.gate_up_interleaved),
    }
    sizes = (config.hidden_size, config.intermediate_size_per_partition, config.num_local_experts, config.top_k or 1)
    return EngineLayer(*sizes, activation, gate, **more)
