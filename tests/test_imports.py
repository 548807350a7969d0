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
    # leaves import one another as they need
    {"flow", "base_config", "checks", "expert_ids", "expert_ids_kernel", "stages", "hf_config", "runtime"},
    {"routing", "permute", "gemm"},  # a stage never imports another stage
    {"fused", "shapes"},
    {"config"},
    {"workspace"},
    {"call"},
    {"failing_calls", "ready_stages", "traced"},
    {"pipeline"},
    {"compose"},
    {"tuning"},
    {"parallel", "operators", "expert_linear"},  # run experts as the tuning tables say
    {"training"},
    {"trtllm", "integrations"},
    {"cli"},
    {"testing"},
    {"packing"},
    {"__init__", "__main__"},
)
LEVEL_OF_UNIT = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# Which other folder a folder of moe/gemm imports from: no family another one, and what two families share neither of them.
OTHER_FOLDERS = {"portable": set(), "wide": {"hopper"}, "swapped": {"hopper"}, "hopper": set()}

DEVICE_ENDINGS = ("_kernel", "_device")  # of files whose code runs on the GPU: entries, and pieces
DEVICE_MODULES = [path for path in MODULES if path.stem.endswith(DEVICE_ENDINGS)]


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_names(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in the file, and what it imports of it: `moe.gemm.config.GemmConfig`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> Iterator[str]:
    """What the file imports of the package: modules, with or without the name that is taken from them."""
    for name in imported_names(path):
        if name.split(".")[0] == "moe":
            yield name if name != "moe" else "moe.__init__"


def jit_lines(path: Path) -> Iterator[int]:
    """Where the file has something compiled for a GPU: by Triton, Gluon, or numba, whose `cuda.jit` has a name of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_jit = isinstance(node, ast.Attribute) and node.attr == "jit"
        if is_jit or (isinstance(node, ast.Name) and node.id == "device_function"):
            yield node.lineno


def in_package(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_drawing_of_the_levels_in_the_docs_is_theirs():
    page = (PACKAGE.parent / "docs" / "README.md").read_text()
    drawing = page.split("`tests/test_imports.py` holds them")[1].split("```")[1].strip()
    drawn = [set(line.split("     ")[0].replace("|", " ").split()) for line in drawing.splitlines()]
    units = {unit_of(path) for path in MODULES}
    assert drawn == [units & level for level in reversed(LEVELS)]


@pytest.mark.parametrize("path", MODULES, ids=in_package)
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


@pytest.mark.parametrize("path", DEVICE_MODULES, ids=in_package)
def test_device_code_imports_no_torch(path: Path):
    for name in imported_names(path):
        assert name.split(".")[0] != "torch", f"{in_package(path)} imports {name}; host code goes to a file beside it"


def test_what_is_compiled_for_a_gpu_lies_in_files_that_say_so():
    assert any(any(jit_lines(path)) for path in DEVICE_MODULES), "is it compiled in another way now?"
    for path in set(MODULES) - set(DEVICE_MODULES):
        for line in jit_lines(path):
            endings = " or ".join(f"{path.stem}{ending}.py" for ending in DEVICE_ENDINGS)
            raise AssertionError(f"{in_package(path)}:{line}: device code; move it to {endings}")


@pytest.mark.parametrize("folder", OTHER_FOLDERS)
def test_families_of_gemms_import_no_other_family(folder: str):
    paths = list((PACKAGE / "gemm" / folder).rglob("*.py"))
    assert paths, f"moe/gemm/{folder} is not there; take it off OTHER_FOLDERS"
    forbidden = set(OTHER_FOLDERS) - {folder} - OTHER_FOLDERS[folder]
    for path in paths:
        for module in imported_modules(path):
            assert module.split(".")[1:3] not in [["gemm", other] for other in forbidden], (
                f"{in_package(path)} imports {module}; what two families use moves to moe/gemm, or to hopper"
            )


def test_what_lies_beside_the_families_of_gemms_imports_none_but_for_who_chooses():
    for path in (PACKAGE / "gemm").glob("*.py"):
        folders = {module.split(".")[2] for module in imported_modules(path) if module.startswith("moe.gemm.")}
        assert path.stem == "kernels" or not folders & set(OTHER_FOLDERS), f"{in_package(path)} imports a family"


def test_runtime_knows_no_stage():
    for path in (PACKAGE / "runtime").rglob("*.py"):
        for module in imported_modules(path):
            assert module.split(".")[1] == "runtime", f"{in_package(path)} imports {module}, which is above it"


def test_import_moe_loads_what_is_asked_for_alone():
    code = (
        "import sys, moe\n"
        "light = 'torch' not in sys.modules\n"
        "missing = [name for name in moe.__all__ if not hasattr(moe, name)]\n"
        "unlisted = sorted(set(moe.__all__) ^ set(moe._MODULE_OF_NAME))\n"
        "print(light, missing, unlisted, moe.tuning.__name__, hasattr(moe, 'nothing_of_the_kind'), moe.MoEConfig.__module__)\n"
        "from moe import *\n"
        "print(TopK.__name__, set(moe.__all__) <= set(dir(moe)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["True [] [] moe.tuning False moe.config", "TopK True"]
