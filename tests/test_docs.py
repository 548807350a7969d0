"""Every Python block of the README and of docs/ runs, and every link to a file has its file."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in LINK.findall(page.read_text()):
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
    missing = [name for name in inspect.signature(moe.trtllm_bf16_moe).parameters if name not in page]
    assert not missing
