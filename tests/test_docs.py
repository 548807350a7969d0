"""Every block of the README and of docs/ runs or is understood, and every link to a file has its file."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE_BLOCK = re.compile(r"^```python title=(\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m moe|make) [^`]*)`")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def python_of(page: Path) -> list[str]:
    return PYTHON_BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path):
    blocks = python_of(page)
    if any("transformers" in block for block in blocks):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def files_of(page: Path) -> list[tuple[str, str]]:
    return FILE_BLOCK.findall(page.read_text())


@pytest.mark.parametrize(
    ("page", "name", "text"),
    [(page, name, text) for page in PAGES for name, text in files_of(page)],
    ids=lambda value: value.name if isinstance(value, Path) else value if value.endswith(".py") else "",
)
def test_a_file_on_a_page_runs_as_it_says(page: Path, name: str, text: str, tmp_path: Path):
    pytest.importorskip("triton")
    (tmp_path / name).write_text(text)
    command = [sys.executable, name]
    if name.startswith("test_"):
        pytest.importorskip("pytest_benchmark")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "moe.testing.benchmark", name]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def commands_of(page: Path) -> list[str]:
    """What a page tells a shell to do: `python -m moe ..` and `make ..`, comments left out."""
    text = page.read_text()
    lines = [line for block in SHELL_BLOCK.findall(text) for line in block.splitlines()]
    commands = [line.partition(" #")[0].strip() for line in lines] + INLINE.findall(text)
    return sorted({command for command in commands if command.startswith(("python -m moe ", "make "))})


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_commands_of_a_page_are_understood(page: Path):
    from moe.cli.arguments import make_parser
    from moe.shapes import NAMED_SHAPES

    rules = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for command in commands_of(page):
        if command.startswith("make "):
            named = {word for word in command.split()[1:] if "=" not in word}
            assert named <= targets, command
            continue
        words = shlex.split(command.replace("NAME", next(iter(NAMED_SHAPES))).partition(">")[0])[3:]
        if "--help" in words or ".." in words or words[0].isupper():
            continue
        try:
            make_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: `{command}` is not understood")


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """As they stand there: literals that continue one another joined, names and numbers in between left out."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [
        piece for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for piece in re.findall(r"`([^`]+)`", row)
    ]
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "moe").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    pieces = [piece.strip() for message in messages for piece in re.split(r"\.\.", message) if piece.strip()]
    assert len(pieces) > 30
    assert [piece for piece in pieces if piece not in joined] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_on_the_map():
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    assert pages <= listed, f"not in docs/README.md: {sorted(pages - listed)}"


def test_flat_call_page_names_every_argument():
    import inspect

    import moe

    page = (ROOT / "docs" / "flat_call.md").read_text()
    names = list(inspect.signature(moe.trtllm_bf16_moe).parameters)
    assert [name for name in names if name not in page] == []
    count = len(names) - len(["is_batch_invariant"])  # ours alone
    for said in (page, (ROOT / "README.md").read_text(), (ROOT / "docs" / "README.md").read_text()):
        assert set(re.findall(r"(\d+)[ -]argument", said)) == {str(count)}
