"""Runs the contract of `gemm/backward/stage_tests.py` with what a module of kernels takes."""

from __future__ import annotations

from typing import Any

import pytest
from gemm.cases import format_id


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.function.__module__.endswith("backward.stage_tests"):
        return
    module = metafunc.module
    kinds = [(activation, form) for activation in module.ACTIVATIONS for form in module.FORMATS]
    axes: dict[str, tuple[Any, Any]] = {
        "stage": (list(module.STAGES), None),
        "tile_rows": (module.TILE_ROWS, "tile_rows{}".format),
        "few_tile_rows": (module.TILE_ROWS[:1], "tile_rows{}".format),
        "usual_dims": (module.DIMS[:1], _dims_id),
        "dims": (module.DIMS, _dims_id),
        "kind": (kinds, lambda kind: f"{kind[0]}-{format_id(kind[1])}"),
        "formats": ([module.FORMATS], lambda formats: ""),
    }
    for name in metafunc.fixturenames:
        if name in axes:
            values, ids = axes[name]
            metafunc.parametrize(name, values, ids=ids)


def _dims_id(dims: dict[str, int]) -> str:
    return f"{dims['hidden_size']}x{dims['intermediate_size']}"
