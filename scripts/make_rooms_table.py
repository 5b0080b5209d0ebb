#!/usr/bin/env python
"""Writes the table of rooms in ARCHITECTURE.md: their order, and what each says of itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- rooms -->\n", "<!-- /rooms -->\n"


def page() -> str:
    """The whole page, its table made anew."""
    from tests.test_architecture import ORDER

    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = ["| room | what it holds |", "|---|---|"]
    for name in ORDER:
        rows += _rows(ROOT / "vera_edge" / name, ROOT / "vera_edge")
    for name in ("vera_edge_gguf", "vera_edge_onnx"):
        rows += _rows(ROOT / "exporters" / name, ROOT)
    return before + BEGIN + "\n".join(rows) + "\n" + END + after


def _rows(path: Path, root: Path) -> Iterator[str]:
    """A row for a module, or for a package and those inside it."""
    shown = path.relative_to(root).as_posix()
    if not path.is_dir():
        yield f"| `{shown}` | {_first_paragraph(path.with_suffix('.py'))} |"
        return
    yield f"| `{shown}/` | {_first_paragraph(path / '__init__.py')} |"
    for inner in sorted(path.iterdir()):
        if (inner / "__init__.py").is_file():
            yield from _rows(inner, root)


def _first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
