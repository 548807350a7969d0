"""The operator of chosen experts: torch's own checks of one."""

import pytest
import torch

import moe.operators  # noqa: F401 - registers it


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_operator_of_chosen_experts_passes_all_of_torchs_checks(id_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w1, w2 = (torch.randn(6, 96, 64) / 8).bfloat16(), (torch.randn(6, 64, 48) / 7).bfloat16()
    ids = torch.tensor([[0, 5], [-1, 3], [2, 1]], dtype=id_dtype)
    arguments = (torch.randn(3, 64).bfloat16(), ids, torch.rand(3, 2), w1, w2, 3, 0, False, None, None, 7.0)
    result = torch.library.opcheck(torch.ops.moe.run_experts.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
