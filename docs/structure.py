"""Draws the package: which part imports which, and what each file is for.

Run: python -m docs.structure           writes docs/structure.md
     python -m docs.structure --check   fails where that page is out of date
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import grimp

PACKAGE = Path("seqjax")
PAGE = Path("docs/structure.md")
TEMPLATE = """\
# The structure of seqjax

Written by `python -m docs.structure`, which reads the sources: do not edit it by hand.

An arrow points from a part, a file or a folder of `seqjax/`, to a part that it imports. An import
that also follows along other arrows is not drawn. All arrows point down: `tests/test_imports.py`
ranks the parts and holds every import to that.

```mermaid
graph TD
{arrows}
```

```
{tree}
```
"""


def arrows() -> Iterator[str]:
    """The imports between parts, without those that follow from others."""
    graph = grimp.build_graph("seqjax", cache_dir=None)
    parts = sorted(graph.find_children("seqjax"))
    for part in parts:
        graph.squash_module(part)
    for part in parts:
        imported = graph.find_modules_directly_imported_by(part) - {part}
        for other in sorted(imported):
            if not any(graph.chain_exists(between, other) for between in imported - {other}):
                yield f"    {part.removeprefix('seqjax.')} --> {other.removeprefix('seqjax.')}"


def tree(folder: Path, indent: str = "") -> Iterator[str]:
    """A line for each file below a folder, with the first line of its docstring; files first."""
    yield line(indent + folder.name + "/", folder / "__init__.py")
    indent += "  "
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield line(indent + path.name, path)
    for path in sorted(folder.glob("*/__init__.py")):
        yield from tree(path.parent, indent)


def line(name: str, source: Path) -> str:
    documentation = ast.get_docstring(ast.parse(source.read_text())) or ""
    return f"{name:26}{documentation.splitlines()[0]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = TEMPLATE.format(arrows="\n".join(arrows()), tree="\n".join(tree(PACKAGE)))
    if not check:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        raise SystemExit(f"{PAGE} is out of date: run `python -m docs.structure`")
