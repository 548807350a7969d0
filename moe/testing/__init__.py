"""What tests of stages and layers need, ours and those of whoever writes a stage of their own.

    check_route, check_permute, check_gemm1, check_gemm2, check_finalize    the contract of a stage, as one call
    make_problem, random_topk, experts_in_float64                           inputs, and the layer without rounding
    assert_close_to_exact, assert_rounded_once, relative_error              close enough
    poisoned_memory                                                         what is read before it is written shows
    measure_stage                                                           a stage's time, beside ours and dense GEMMs
    moe.testing.benchmark                                                   the same as a fixture of pytest-benchmark

With TRITON_INTERPRET=1, importing this makes Triton's interpreter right for bfloat16 (`moe.testing.interpreter`): do so before
the first kernel runs.
"""

import os

from moe.testing.closeness import assert_close_to_exact, assert_rounded_once, relative_error
from moe.testing.poison import poisoned_memory
from moe.testing.problems import Problem, experts_in_float64, make_problem, random_topk
from moe.testing.stages import (
    StageCase,
    check_finalize,
    check_gemm1,
    check_gemm2,
    check_permute,
    check_route,
    stage_cases,
)
from moe.testing.timing import StageTimes, measure_stage

if os.environ.get("TRITON_INTERPRET") == "1":
    import moe.testing.interpreter  # noqa: F401

__all__ = [
    "Problem",
    "StageCase",
    "StageTimes",
    "assert_close_to_exact",
    "assert_rounded_once",
    "check_finalize",
    "check_gemm1",
    "check_gemm2",
    "check_permute",
    "check_route",
    "experts_in_float64",
    "make_problem",
    "measure_stage",
    "poisoned_memory",
    "random_topk",
    "relative_error",
    "stage_cases",
]
