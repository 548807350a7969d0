"""How close a bf16 result must be to the float64 truth. The budget comes from data, not from a constant that was tuned."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_RELATIVE_FROBENIUS = 1e-2  # good bf16 paths have 4e-3 to 6e-3 over two GEMMs
BF16_EPSILON = 2.0**-8  # half the gap between neighbours, relative
MAX_SHARE_OFF_NEAREST = 1e-2  # in float32 0.2e-2 at the most, with one more rounding to bf16 11e-2 at the least


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, Frobenius, in float64; 0 for two empty or two zero tensors."""
    difference = torch.linalg.vector_norm(actual.double() - exact.double()).item()
    return difference / torch.linalg.vector_norm(exact.double()).item() if difference else 0.0


def assert_close_to_exact(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Hold a kernel's result against the float64 truth.

    The whole: relative Frobenius error of at most 1e-2. Each element: an error of at most twice the worst error that the
    bf16 reference has in its row, plus one rounding of the element itself.

    Args:
        actual: [rows, columns], the result under test.
        reference: the same by the bf16 torch reference, which shares no code with it.
        exact: the same in float64.
    """
    _expect(actual.shape == exact.shape, f"shape {list(actual.shape)}, wanted {list(exact.shape)}")
    if not actual.numel():
        return
    is_finite = torch.isfinite(actual)
    _expect(bool(is_finite.all()), f"not finite at {(~is_finite).nonzero()[:5].tolist()}")
    error = relative_error(actual, exact)
    _expect(error <= MAX_RELATIVE_FROBENIUS, f"relative Frobenius error {error:.3e}")
    difference = (actual.double() - exact.double()).abs()
    reference_error = (reference.double() - exact.double()).abs().amax(dim=-1, keepdim=True)
    budget = 2 * (reference_error + BF16_EPSILON * exact.double().abs())
    worst = (difference - budget).argmax()
    at = tuple(int(i) for i in torch.unravel_index(worst, difference.shape))
    _expect(
        bool(difference[at] <= budget[at]),
        f"at {list(at)}: got {actual[at].item()}, exact {exact[at].item()}, error {difference[at].item():.3e}, "
        f"budget {budget[at].item():.3e}; {(difference > budget).sum().item()} elements over budget",
    )


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Hold a bf16 result against the nearest bf16 of the float64 truth: bit for bit, but for one element in 100.

    What sums in float32 are off by moves few elements to a neighbour; a value that is rounded to bf16 before the end moves
    many, by too little for `assert_close_to_exact` to tell.
    """
    num_off = int((actual != exact.to(torch.bfloat16)).sum())
    _expect(
        num_off <= MAX_SHARE_OFF_NEAREST * exact.numel(),
        f"{num_off} of {exact.numel()} elements are not the nearest bf16",
    )


def _expect(is_so: bool, otherwise: str) -> None:
    """Not `assert`, which Python leaves out with -O."""
    if not is_so:
        raise AssertionError(otherwise)
