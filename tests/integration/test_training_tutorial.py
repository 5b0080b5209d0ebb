"""docs/training.md, word for word, on a tiny model: the script before, the lines changed, every command."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import Cli
from tests.test_docs import BLOCK

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
MOST = 5  # lines that may be changed


def changed(script: str, diff: str) -> str:
    """The script with a diff's lines: those with - replaced, in order, by those with + that follow."""
    count = 0
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff, re.MULTILINE):
        before, after = (re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in (old, new))
        assert script.count(before) == 1, before
        script = script.replace(before, after)
        count += max(before.count("\n"), after.count("\n"))
    assert count <= MOST
    return script


def test_the_page_runs_from_a_peft_script_to_a_device(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, since every other one would load torch again."""
    shutil.copytree(tiny_llama.fp32, tmp_path / "model")
    for name in ("train.txt", "eval.txt"):
        (tmp_path / name).write_text(tiny.TEXT * 16)
    monkeypatch.chdir(tmp_path)
    kinds = []
    for kind, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        kinds.append(kind)
        if kind == "python":
            Path("train.py").write_text(body)
            runpy.run_path("train.py")
            shutil.move("adapter", "adapter-nf4")
        elif kind == "diff":
            Path("train.py").write_text(changed(Path("train.py").read_text(), body))
        else:
            run_each(body, cli)
    assert kinds == ["python", "sh", "diff", "sh", "sh"]
    for out in ("out", "out-int4"):
        assert json.loads(Path(out, "vera_edge.json").read_text())["adapters"]


def run_each(body: str, cli: Cli) -> None:
    """The commands of a block."""
    for line in body.splitlines():
        program, *words = shlex.split(line)
        if program == "python":
            runpy.run_path(words[0])
            continue
        assert program == "vera-edge"
        result = cli(*words)
        assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
