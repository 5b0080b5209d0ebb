"""The tutorial, word for word, on a tiny base: its Python, its recipe, every one of its commands."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import Cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|toml|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_from_training_to_the_device(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, since every other one would load torch again; what isn't ours in a shell."""
    shutil.copytree(tiny_llama.nf4, tmp_path / "base")
    for name, times in (("train.txt", 4), ("eval.txt", 8)):
        (tmp_path / name).write_text(tiny.TEXT * times)
    monkeypatch.chdir(tmp_path)
    kinds = []
    for kind, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        kinds.append(kind)
        if kind == "toml":
            Path("release.toml").write_text(body)
        elif kind == "python":
            Path("train.py").write_text(body)
            runpy.run_path("train.py")
        else:
            for line in body.splitlines():
                run(line, cli)
    assert kinds == ["python", "sh", "toml", "sh", "sh", "sh"]
    assert (tmp_path / "device" / "current" / "evidence" / "drift.json").is_file()
    assert (tmp_path / "out-2" / "v1" / "branch" / "model.sig").is_file()


def run(line: str, cli: Cli) -> None:
    """A line of a shell's block."""
    program, *words = shlex.split(line)
    if program == "vera-edge":
        result = cli(*words)
        assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
