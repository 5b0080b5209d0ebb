"""An export that was killed goes on from what it had finished, to the bytes of one that wasn't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import exported, tiny, tiny_encoder
from vera_edge.errors import CheckpointError, OutputError
from vera_edge.exporting import target

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="exports are killed in forks")

# Imports once what exports need; then does each export in a child of its own, which kills itself where
# something begins for the n-th time. A line of jobs on stdin is answered by one on stdout: how each ended,
# and what it did.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import onnx.reference, onnxruntime_genai.models.builder, onnxscript.optimizer, peft, torch, transformers
import torch.onnx._internal.exporter
import vera_edge_onnx.decoder.export
import vera_edge_onnx.encoder.export
from vera_edge.exporting import target

def export(base, adapter, out, mode, weights, options, moment, pipe):
    calls = []

    def progress(what, done, total):
        calls.append(what)
        os.write(pipe, f"{what}\\n".encode())
        if what == moment[0] and calls.count(what) == moment[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    target.export(Path(base), [(Path(adapter), 1.0)], Path(out), mode=mode, weights=weights, options=options,
                  progress=progress)

for line in sys.stdin:
    found = []
    for job in json.loads(line):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                export(*job, write)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        os.close(write)
        with open(read) as stream:
            calls = stream.read().splitlines()
        found.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls, Path(job[2]).exists()])
    print(json.dumps(found), flush=True)
"""
NEVER = ("", 0)
KILLED = -9


class Forks:
    """Exports in forks of one process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def run(self, *jobs: tuple[object, ...]) -> list[tuple[int, list[str], bool]]:
        """Of each job its exit code, what it told of its progress, and whether its folder was there then."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(jobs, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        found = [(code, calls, there) for code, calls, there in json.loads(line)]
        assert {code for code, _, _ in found} <= {0, KILLED}
        return found


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.process.communicate()
    assert made.process.returncode == 0


@pytest.mark.parametrize(
    ("mode", "weights", "options"),
    [("merged", "int8", {}), ("branch", "nf4", {"run": "int8", "origin": "seed"}), ("merged", "fp32", {})],
)
def test_kills_lose_nothing(
    mode: str, weights: str, options: dict[str, str], tiny_llama: tiny.TinyLlama, forks: Forks, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    made = "expanding the weights" if "run" in options else "quantizing"
    moments = [("drawing the graph", 1), (made, 5), ("writing weights", 4), ("writing weights", 10), NEVER]
    moments = [moment for moment in moments if moment[0] != made or weights != "fp32"]
    common = (mode, weights, options)
    (_, whole, _), *runs = forks.run(
        (tiny_llama.fp32, adapter, tmp_path / "whole", *common, NEVER),
        *((tiny_llama.fp32, adapter, tmp_path / "out", *common, moment) for moment in moments),
    )
    assert [(code, there) for code, _, there in runs] == [*[(KILLED, False)] * (len(moments) - 1), (0, True)]
    compared, last = "comparing the graph with the model", runs[-1][1]
    before = last[: last.index("writing weights")]  # what a device will write is tried after it
    assert compared in whole and compared not in before and made not in before
    assert exported.files(tmp_path / "out") == exported.files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_an_encoder_goes_on_too(forks: Forks, tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    common = ("merged", "int8", {"activations": "dynamic"})
    moments = [("writing weights", 4), NEVER]
    _, *runs = forks.run(
        (base, adapter, tmp_path / "whole", *common, NEVER),
        *((base, adapter, tmp_path / "out", *common, moment) for moment in moments),
    )
    assert [(code, there) for code, _, there in runs] == [(KILLED, False), (0, True)]
    assert exported.files(tmp_path / "out") == exported.files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_another_base_is_not_gone_on_from(tiny_llama: tiny.TinyLlama, forks: Forks, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_llama.fp32, base)
    adapter = tiny.make_adapter(base, tmp_path / "adapter")
    killed: tuple[object, ...] = (base, adapter, out, "merged", "int8", {}, ("quantizing", 3))
    forks.run(killed)
    (before,) = [path.name for path in next(tmp_path.glob(".out.*")).iterdir() if path.is_dir()]
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.roll(tensors[name], 1, axis=0)  # same names, shapes, sizes
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    target.export(base, [(adapter, 1.0)], tmp_path / "whole", mode="merged", weights="int8")
    forks.run(killed)
    (after,) = [path.name for path in next(tmp_path.glob(".out.*")).iterdir() if path.is_dir()]
    assert before != after
    target.export(base, [(adapter, 1.0)], out, mode="merged", weights="int8")
    assert exported.files(out) == exported.files(tmp_path / "whole")


def test_a_base_that_changes_meanwhile_is_told_and_nothing_left(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    adapter = tiny.make_adapter(base, tmp_path / "adapter")

    def progress(what: str, done: int, total: int) -> None:
        if what == "writing weights":
            os.utime(base / "model.safetensors", (1, 1))

    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was exported"):
        target.export(base, [(adapter, 1.0)], tmp_path / "out", weights="int8", progress=progress)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("kind", ["initializers", "out/onnx"])
def test_what_was_damaged_since_is_made_again(
    kind: str, tiny_llama: tiny.TinyLlama, forks: Forks, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    common: tuple[object, ...] = (tiny_llama.fp32, adapter, tmp_path / "out", "merged", "int8", {})
    forks.run((*common, ("writing weights", 8)))
    (folder,) = next(tmp_path.glob(".out.*")).glob("*/" + kind)
    damaged = [path for path in folder.iterdir() if path.is_file()]
    assert damaged
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    target.export(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "whole", mode="merged", weights="int8")
    forks.run((*common, NEVER))
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
