"""Imports go down only, and `import moe` needs neither a GPU nor a compiler of kernels."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe

PACKAGE = Path(moe.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each unit is a file or a folder of the package; it imports units of lower levels, and itself.
LEVELS = (
    {
        "flow",
        "base_config",
        "checks",
        "expert_ids",
        "shapes",
        "stages",
        "runtime",
        "hf_config",
    },  # leaves import one another as they need
    {"routing", "permute", "gemm"},  # a stage never imports another stage
    {"fused"},
    {"config"},
    {"pipeline"},
    {"tuning"},
    {"trtllm", "cli"},
    {"integrations"},
    {"__init__", "__main__"},
)
LEVEL_OF_UNIT = {unit: level for level, units in enumerate(LEVELS) for unit in units}


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Every module of the package that the file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "moe")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            if (node.module or "").split(".")[0] == "moe":
                yield from ([f"moe.{alias.name}" for alias in node.names] if node.module == "moe" else [node.module])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path):
    unit = unit_of(path)
    assert unit in LEVEL_OF_UNIT, f"{unit} has no level in tests/test_imports.py; give it one"
    for module in imported_modules(path):
        other = module.split(".")[1]
        if other == unit or (LEVEL_OF_UNIT[unit] == LEVEL_OF_UNIT.get(other) == 0):
            continue
        assert LEVEL_OF_UNIT.get(other, 99) < LEVEL_OF_UNIT[unit], f"{path.relative_to(PACKAGE)} imports {module}"


def test_import_moe_loads_no_kernel_compiler_and_no_gpu():
    code = (
        "import sys, torch\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import moe\n"
        "new = {name.split('.')[0] for name in sys.modules} - before\n"
        "print(sorted(new & {'triton', 'numba', 'numba_cuda', 'cuda', 'transformers'}), torch.cuda.is_initialized())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


def test_cpu_pipeline_loads_no_kernel_compiler():
    code = (
        "import sys, torch, moe\n"
        "config = moe.MoEConfig.create(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)\n"
        "def normal(*shape): return torch.randn(*shape).bfloat16()\n"
        "x = moe.build_pipeline(config, 'cpu')(torch.randn(3, 4), normal(3, 64), normal(4, 128, 64), normal(4, 64, 64))\n"
        "print([name for name in ('triton', 'numba') if name in sys.modules], list(x.shape))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] [3, 64]"


def test_kernel_modules_hold_device_code_only():
    for path in PACKAGE.rglob("*_kernel.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "torch" not in imported, (
            f"{path.name} imports torch; host code goes to {path.name.replace('_kernel', '')}"
        )
