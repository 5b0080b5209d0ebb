"""The page of drift tables: each run of the bench writes its own section and leaves the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench_drift_table as tables


def test_a_section_takes_its_place_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "drift-table.md"
    monkeypatch.setattr(tables, "PAGE", page)
    page.write_text("# Drift\n\n## What each bit buys\n\nrows\n", encoding="utf-8")
    for title in (tables.SECOND, tables.LLAMA, tables.LORA):
        tables.write_section(title, f"of {title}\n")
    tables.write_section(tables.LORA, "anew")
    wanted = ["# Drift", "## What each bit buys", "rows"]
    wanted += [tables.LLAMA, f"of {tables.LLAMA}", tables.LORA, "anew", tables.SECOND, f"of {tables.SECOND}"]
    assert page.read_text(encoding="utf-8") == "\n\n".join(wanted) + "\n"
    tables.write(None, "## What each bit buys\n\nother rows")
    assert page.read_text(encoding="utf-8") == "\n\n".join(wanted).replace("\nrows", "\nother rows") + "\n"
