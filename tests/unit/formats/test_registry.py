"""The registry: what is known, what another distribution adds, and that looking costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vera_edge import formats
from vera_edge.errors import FormatError


def test_every_format_answers_to_its_name() -> None:
    for name in formats.FORMATS:
        assert formats.get(name).name == name
    assert len(formats.FORMATS) == len(list(formats.FORMATS)) == len(set(formats.FORMATS))
    with pytest.raises(FormatError, match="no weight format is called 'nf5'; known: fp32, fp16, bf16, nf4"):
        formats.get("nf5")


def test_importing_the_registry_imports_no_uncommon_format() -> None:
    code = (
        "import sys, vera_edge.formats as f; assert 'gptq' in f.FORMATS; "
        "print([m for m in ('torch', 'gguf', 'vera_edge.formats.gptq', 'vera_edge.formats.hqq') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PLUGIN = """
from vera_edge.formats.dense import Dense

class Renamed(Dense):
    quant_method = "mine"

FORMAT = Renamed("fp32")
object.__setattr__(FORMAT, "name", "mine")
"""


def test_another_distribution_adds_a_format(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vera_edge.formats]\nmine = mine:FORMAT\nbroken = mine:NOT_THERE\n"
    )
    code = (
        "from vera_edge import formats\n"
        "from vera_edge.errors import FormatError\n"
        "assert 'mine' in formats.FORMATS and formats.get('mine').quant_method == 'mine'\n"
        "try:\n    formats.get('broken')\nexcept FormatError as e:\n    print(e)\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}:{Path(formats.__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert done.stdout.startswith("the weight format 'broken' of mine can't be loaded (")
