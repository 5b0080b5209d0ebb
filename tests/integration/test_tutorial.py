"""The tutorial, word for word, on a tiny base: its Python, its recipe, every one of its commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests import tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|toml|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_from_training_to_the_device(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama.nf4, tmp_path / "base")
    for name, times in (("train.txt", 4), ("eval.txt", 8)):
        (tmp_path / name).write_text(tiny.TEXT * times)
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "vera-edge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_edge "$@"\n')
    (scripts / "vera-edge").chmod(0o755)
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    kinds = []
    for kind, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        kinds.append(kind)
        if kind == "toml":
            (tmp_path / "release.toml").write_text(body)
            continue
        command = [sys.executable, "-c", body] if kind == "python" else ["sh", "-exc", body]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{body}\n{run.stdout}\n{run.stderr}"
    assert kinds == ["python", "sh", "toml", "sh", "sh", "sh"]
    assert (tmp_path / "device" / "current" / "evidence" / "drift.json").is_file()
    assert (tmp_path / "out-2" / "v1" / "branch" / "model.sig").is_file()
