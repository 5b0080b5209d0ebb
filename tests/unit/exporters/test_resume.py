"""An export that was killed goes on from what it had finished, to the bytes of one that wasn't."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import exported, tiny
from vera_edge.errors import OutputError
from vera_edge.exporting import target

# Exports, and kills itself where something begins for the n-th time; prints what was done anew.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from vera_edge.exporting import target
base, adapter, out, mode, weights, options, (where, times) = json.loads(sys.argv[1])
calls = []

def progress(what, done, total):
    calls.append(what)
    if what == where and calls.count(what) == times:
        os.kill(os.getpid(), signal.SIGKILL)

target.export(Path(base), [(Path(adapter), 1.0)], Path(out), mode=mode, weights=weights, options=options,
              progress=progress)
print(json.dumps(calls))
"""


NEVER = ("", 0)


def run(*arguments: object) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments, default=str)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if not done.returncode else []


@pytest.mark.skipif(os.name != "posix", reason="kills")
@pytest.mark.parametrize(
    ("mode", "weights", "options"),
    [("merged", "int8", {}), ("branch", "nf4", {"run": "int8", "origin": "seed"}), ("merged", "fp32", {})],
)
def test_kills_lose_nothing(
    mode: str, weights: str, options: dict[str, str], tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    common = (tiny_llama.fp32, adapter)
    _, whole = run(*common, tmp_path / "whole", mode, weights, options, NEVER)
    made = "expanding the weights" if "run" in options else "quantizing"
    moments = [("drawing the graph", 1), (made, 5), ("writing weights", 4), ("writing weights", 10)]
    for moment in moments:
        if moment[0] in whole:
            code, _ = run(*common, tmp_path / "out", mode, weights, options, moment)
            assert code == -signal.SIGKILL and not (tmp_path / "out").exists()
    code, calls = run(*common, tmp_path / "out", mode, weights, options, NEVER)
    assert code == 0
    compared = "comparing the graph with the model"
    assert compared in whole and compared not in calls and made not in calls
    assert exported.files(tmp_path / "out") == exported.files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_another_base_is_not_gone_on_from(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_llama.fp32, base)
    adapter = tiny.make_adapter(base, tmp_path / "adapter")
    code, _ = run(base, adapter, out, "merged", "int8", {}, ("quantizing", 3))
    assert code == -signal.SIGKILL
    (before,) = [path.name for path in next(tmp_path.glob(".out.*")).iterdir() if path.is_dir()]
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.roll(tensors[name], 1, axis=0)  # same names, shapes, sizes
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    target.export(base, [(adapter, 1.0)], tmp_path / "whole", mode="merged", weights="int8")
    code, _ = run(base, adapter, out, "merged", "int8", {}, ("quantizing", 3))
    (after,) = [path.name for path in next(tmp_path.glob(".out.*")).iterdir() if path.is_dir()]
    assert before != after
    target.export(base, [(adapter, 1.0)], out, mode="merged", weights="int8")
    assert exported.files(out) == exported.files(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["initializers", "out/onnx"])
def test_what_was_damaged_since_is_made_again(kind: str, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    common = (tiny_llama.fp32, adapter)
    run(*common, tmp_path / "whole", "merged", "int8", {}, NEVER)
    run(*common, tmp_path / "out", "merged", "int8", {}, ("writing weights", 8))
    (folder,) = next(tmp_path.glob(".out.*")).glob("*/" + kind)
    damaged = [path for path in folder.iterdir() if path.is_file()]
    assert damaged
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    run(*common, tmp_path / "out", "merged", "int8", {}, NEVER)
    assert exported.files(tmp_path / "out") == exported.files(tmp_path / "whole")


def test_two_at_once_are_kept_apart(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    inner: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantizing" and not inner:
            with pytest.raises(OutputError, match="at work") as refused:
                target.export(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "out", weights="int8")
            inner.append(str(refused.value))

    target.export(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "out", weights="int8", progress=progress)
    assert inner and (tmp_path / "out" / "vera_edge.json").is_file()
