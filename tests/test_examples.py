"""Examples are short, and run as far as this machine goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", ["compiled_model", "own_pipeline"])
def test_an_example_runs(name: str):
    if name == "compiled_model":
        pytest.importorskip("transformers")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_example_of_an_engine_needs_nothing_but_the_engine(engine: str):
    code = f"import examples.serve_{engine} as example; example.main('none')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    if f"No module named '{engine}'" not in run.stderr:
        pytest.skip(f"{engine} is here")


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem != "parallel_layer"], ids=lambda path: path.name
)
def test_an_example_is_under_40_lines(path: Path):
    assert len(path.read_text().splitlines()) < 40
