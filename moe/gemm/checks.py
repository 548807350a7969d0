"""What the tensors of the two grouped GEMMs must be; each function raises before anything is launched or written."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.checks import expect, expect_no_scales, expect_type, is_as_expected, no_case
from moe.flow import Permutation, SwigluParams
from moe.gemm.config import BLOCK_MAJOR_K, PARAMETERS, GemmConfig, WeightLayout

BIAS_DTYPES = (torch.bfloat16, torch.float32)


def check_weights(
    config: GemmConfig,
    name: str,
    weights: Tensor,
    device: torch.device | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Raise unless `weights` is a tensor of config.weight_shape, in bf16 but for a reference of another dtype."""
    if is_as_expected(weights, config.weight_shape, dtype, device):
        return
    if isinstance(weights, Tensor) and config.weight_format.layout is WeightLayout.BlockMajorK:
        expect_no_scales(name, weights, (torch.bfloat16,))
        _check_block(config, name, weights)
    axes, dims = _weight_axes(config)
    words = _weight_words(config, weights, axes)
    expect(name, weights, " ".join(axes), dims, dtype=dtype, device=device, words=words)


def check_bias(config: GemmConfig, name: str, bias: Tensor | None, device: torch.device | None = None) -> None:
    """Raise unless `bias` is None, or [E_local, N] bf16 or float32: a number for each row of an expert's weight."""
    shape = (config.num_experts, config.weight_rows)
    if bias is None or any(is_as_expected(bias, shape, dtype, device) for dtype in BIAS_DTYPES):
        return
    rows = "H" if config.activation is None else "2I" if config.is_gated else "I"
    expect(name, bias, f"E_local {rows}", dict(zip(("E_local", rows), shape)), dtype=BIAS_DTYPES, device=device)


def _weight_axes(config: GemmConfig) -> tuple[list[str], dict[str, int]]:
    """The stored axes' names, and their sizes: N is 2I or I in gemm1 and H in gemm2, K is H and I."""
    if config.activation is None:
        rows, columns = "H", "I"
    else:
        rows, columns = "2I" if config.is_gated else "I", "H"
    blocks = f"{columns}/{BLOCK_MAJOR_K}"
    match config.weight_format.layout:
        case WeightLayout.MajorK:
            axes = ["E_local", rows, columns]
        case WeightLayout.MajorMn:
            axes = ["E_local", columns, rows]
        case WeightLayout.BlockMajorK:
            axes = ["E_local", blocks, rows, str(BLOCK_MAJOR_K)]
        case _:
            raise no_case(config.weight_format.layout, "moe/gemm/checks.py, _weight_axes")
    return axes, dict(zip(axes, config.weight_shape))


def _weight_words(config: GemmConfig, weights: Tensor, axes: list[str]) -> dict[str, str]:
    """The original op's sentences by axis, as `expect` takes them."""
    stage = "gemm2" if config.activation is None else "gemm1"
    k_axis = 2 if config.weight_format.layout is WeightLayout.MajorK else 1
    n_axis = 1 if config.weight_format.layout is WeightLayout.MajorK else 2
    k_size = "intermediate_size" if stage == "gemm2" else "hidden_size"
    words = {
        "E_local": f"{stage} weights dim0 must equal local_num_experts: weights of all experts or of another rank?",
        axes[k_axis]: f"{stage} weights K dimension must be equal to {k_size}.",
        "dtype": f"BF16 MoE: {stage}_weights must be bfloat16.",
    }
    if stage == "gemm1":
        is_odd = (
            config.is_gated and isinstance(weights, Tensor) and weights.dim() > n_axis and weights.shape[n_axis] % 2
        )
        words[axes[n_axis]] = (
            "gemm1 weights Mn dimension must be even." if is_odd else "intermediate_size has incorrect shape."
        )
    return words


def _check_block(config: GemmConfig, name: str, weights: Tensor) -> None:
    """Tell those who followed the original's documentation page, or cut K into other blocks, what is right."""
    if weights.dim() == 4 and weights.shape[3] == BLOCK_MAJOR_K:
        return
    axes, dims = _weight_axes(config)
    wanted = ", ".join(axis if axis.isdigit() else f"{axis}={dims[axis]}" for axis in axes)
    got = list(weights.shape)
    if weights.dim() != 4:
        raise ValueError(
            f"{name}: expected 4-D [{wanted}], got {weights.dim()}-D {got}; convert logical weights with "
            "moe.gemm.weight_format.pack_weights (a reshape would put other numbers in their places)"
        )
    rows, columns = config.weight_rows, config.in_features
    page_text, page_shape = "[E, M//128, H//128, 128]", [rows // 128, columns // 128, 128]
    if config.activation is None:
        page_text, page_shape = "[E, H//128, I, 128]", [rows // 128, columns, 128]
    if got[1:] == page_shape:
        raise ValueError(
            f"{name}: expected [{wanted}], got {got}; the shape {page_text} on the original op's documentation page "
            f"is wrong: a block is {BLOCK_MAJOR_K} elements of the contraction, for all rows. "
            "Convert logical weights with moe.gemm.weight_format.pack_weights"
        )
    raise ValueError(
        f"{name}: expected [{wanted}], got {got}; blocks of the contraction are {BLOCK_MAJOR_K} elements (128 bytes), "
        f"not {got[3]}. Convert logical weights with moe.gemm.weight_format.pack_weights"
    )


def check_swiglu(
    config: GemmConfig, swiglu: SwigluParams | None, device: torch.device, *, dtype: torch.dtype = torch.float32
) -> None:
    """Raise unless each parameter is [E_local] fp32 (but for a reference of another dtype), and one that the activation takes."""
    if swiglu is None:
        return
    expect_type("swiglu", swiglu, SwigluParams, "moe.SwigluParams(alpha, beta, clamp_limit) makes one")
    for name in ("alpha", "beta", "clamp_limit"):
        parameter = getattr(swiglu, name)
        if parameter is None:
            continue
        if config.activation is None or name not in PARAMETERS.get(config.activation, ()):
            takers = ", ".join(activation.name for activation, names in PARAMETERS.items() if name in names)
            raise ValueError(
                "gemm1_alpha, gemm1_beta, and gemm1_clamp_limit are only supported for ActivationType.Swiglu. "
                f"(Here gemm1_{name} is for {takers}): got gemm1_{name} with activation {config.activation!r}; leave it out"
            )
        dims = {"E_local": config.num_experts}
        expect(f"gemm1_{name}", parameter, "E_local", dims, dtype=dtype, device=device)


def check_gather(
    config: GemmConfig,
    hidden_states: Tensor,
    weights: Tensor,
    permutation: Permutation,
    swiglu: SwigluParams | None,
    bias: Tensor | None = None,
) -> None:
    """Raise unless the tensors fit a gemm1 of this config: hidden_states [T, H] bf16, weights of weight_shape, a bias by row."""
    device = permutation.token_of_row.device
    num_tokens = permutation.row_of_slot.shape[0]
    if not is_as_expected(hidden_states, (num_tokens, config.in_features), torch.bfloat16, device):
        dims = {"T": num_tokens, "H": config.in_features}
        expect("hidden_states", hidden_states, "T H", dims, dtype=torch.bfloat16, device=device)
    check_weights(config, "gemm1_weights", weights, device)
    check_swiglu(config, swiglu, device)
    check_bias(config, "gemm1_bias", bias, device)


def check_grouped(
    config: GemmConfig, rows: Tensor, weights: Tensor, permutation: Permutation, bias: Tensor | None = None
) -> None:
    """Raise unless the tensors fit a gemm2 of this config: rows [P, I] bf16, weights of weight_shape, a bias by row of them."""
    device = permutation.token_of_row.device
    if not is_as_expected(rows, (permutation.max_rows, config.in_features), torch.bfloat16, device):
        dims = {"P": permutation.max_rows, "I": config.in_features}
        expect("rows", rows, "P I", dims, dtype=torch.bfloat16, device=device)
    check_weights(config, "gemm2_weights", weights, device)
    check_bias(config, "gemm2_bias", bias, device)
