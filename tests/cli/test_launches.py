"""The table of launches, from what a profiler reports."""

import pytest

from moe.__main__ import main
from moe.cli.launches import Launch, LaunchReport, launches_of_calls, launches_text, short_name

NUMBA = "moe::plan_kernel[abi:v26,cw51cXTLSUwv1sDUaKthqaNgoKmjgEhas](int32_2a, int32_2a, int, int)"
MANGLED = "_ZN3moe7routing12topk_kernel11topk_kernelB2v1B40c8tJTIeFCjyCbUFRqqO8ETPKJK4gCvyEj"


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(NUMBA, "plan_kernel"), (MANGLED, "topk_kernel"), ("finalize_kernel", "finalize_kernel"),
     ("void at::native::fill<int>(int)", "fill")],
    ids=["numba", "mangled", "triton", "torch"],
)  # fmt: skip
def test_kernels_are_named_as_in_the_source(kernel, name):
    assert short_name(kernel) == name


def test_a_launch_takes_the_median_over_calls_without_the_first():
    calls = [
        [("a_kernel", 900.0), ("b_kernel", 1.0)],
        *([("a_kernel", us), ("b_kernel", 5.0)] for us in (1.0, 3.0, 8.0)),
    ]
    assert launches_of_calls(calls) == [Launch("a_kernel", 3.0), Launch("b_kernel", 5.0)]


def test_calls_that_differ_are_refused():
    with pytest.raises(ValueError, match="expected the same launches"):
        launches_of_calls([[("a", 1.0)], [("a", 1.0)], [("b", 1.0)]])


def test_the_table_has_a_line_a_launch_and_the_sum():
    text = launches_text("tiny", LaunchReport(1, [Launch("a_kernel", 1.5), Launch("b_kernel", 2.25)], 5.0, 4.0))
    assert text.splitlines()[0] == "tiny, 1 tokens"
    assert [line.split()[1] for line in text.splitlines()[3:]] == ["1.50", "2.25", "3.75", "5.00", "4.00"]


def test_a_machine_without_a_gpu_is_told_so(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["launches", "--device", "cpu"])
    assert stop.value.code == 2
    assert "launches: expected a GPU" in capsys.readouterr().err


def test_launches_of_a_layer_are_routing_and_the_two_few_token_kernels(cuda, capsys):
    assert main(["launches", "--model", "olmoe-1b-7b", "--tokens", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line[:1].isdigit()] == [
        "topk_kernel",
        "few_token_gemm1_kernel",
        "few_token_gemm2_finalize_kernel",
    ]
