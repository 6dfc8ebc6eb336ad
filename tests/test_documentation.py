"""The code in README.md and docs/ runs as it stands there."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path) -> None:
    """Blocks of a page share their names, top to bottom; those with torch run where it is."""
    blocks = BLOCK.findall(page.read_text())
    assert blocks, f"{page.name} has no python block"
    has_torch = importlib.util.find_spec("torch") is not None
    names: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):  # As a reader has it, and as optax needs it.
        for block in blocks:
            if has_torch or "torch." not in block:
                exec(compile(block, str(page), "exec"), names)
