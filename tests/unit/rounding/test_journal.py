"""Rounding that was killed goes on from what it had finished, to the bytes of an unbroken run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.unit.rounding.test_writeback import WINDOWS, letters
from vera_edge import merging
from vera_edge.errors import OutputError
from vera_edge.merging import Prepared
from vera_edge.requantize import Codes, Grid, int_blocks, requantize
from vera_edge.rounding import writeback
from vera_edge.rounding.journal import Rounded, RoundingJournal, key_of
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.rounding.writeback import Calibration, Recovered, write_back

RECOVER = ("lambda_b", "lambda_d", "low-rank=2", "bias")


class _Killed(BaseException):
    """What no part of the library catches."""


@dataclass
class _Dying(RoundingJournal):
    """A journal whose process ends after some modules, or in the middle of one."""

    left: int = 1 << 30
    put_again: list[str] = field(default_factory=list)

    def put(self, module: str, rounded: Rounded) -> None:
        if self.left == 0:
            raise _Killed
        self.left -= 1
        self.put_again.append(module)
        super().put(module, rounded)


@pytest.fixture
def ready(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> Prepared:
    return merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])


def grids_of(ready: Prepared) -> dict[str, Grid]:
    return dict.fromkeys(ready.model.checkpoint.linears, int_blocks(4, 32, symmetric=False))


def run(
    ready: Prepared, journal: RoundingJournal, recover: tuple[str, ...] = RECOVER, light: bool = False
) -> Recovered:
    calibration = Calibration(WINDOWS[:4], recover=recover)
    none: Any = lambda module, codes: None  # noqa: E731
    return write_back(
        ready.model, grids_of(ready), calibration, none, not recover, journal=journal, layer_by_layer=light
    )


def arrays(codes: Mapping[str, Codes], won: Recovered) -> dict[str, bytes]:
    """All bytes of a result by their names."""
    found: dict[str, Any] = {}
    for module, one in codes.items():
        found |= {f"{module}.codes": one.codes, f"{module}.scales": one.scales, f"{module}.zeros": one.zeros}
    for module, vectors in won.vectors.items():
        found |= {f"{module}.b": vectors.lambda_b, f"{module}.d": vectors.lambda_d}
    for module, term in won.corrections.items():
        found |= {f"{module}.up": term.up, f"{module}.down": term.down, f"{module}.bias": term.bias}
    return {name: np.ascontiguousarray(values).tobytes() for name, values in found.items()}


@pytest.mark.parametrize("recover", [RECOVER, ()])
def test_a_run_goes_on_wherever_the_one_before_ended(
    ready: Prepared, tmp_path: Path, recover: tuple[str, ...]
) -> None:
    grids = grids_of(ready)
    (tmp_path / "whole").mkdir()
    whole = RoundingJournal(tmp_path / "whole", grids)
    expected = arrays(whole, run(ready, whole, recover))
    assert len(whole) == len(grids) == 14
    for count in (1, 3, 7, 9, 13, 14):
        folder = tmp_path / str(count)
        folder.mkdir()
        if count < len(grids):
            with pytest.raises(_Killed):
                run(ready, _Dying(folder, grids, left=count), recover)
        else:
            run(ready, _Dying(folder, grids), recover)
        again = _Dying(folder, grids)
        assert len(again) == count
        assert arrays(again, run(ready, again, recover)) == expected
        # What reads the same input is rounded together, so that some of it may be done twice.
        assert len(again.put_again) <= len(grids) - count + 2


def test_the_codes_are_the_same_layer_by_layer(
    ready: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for light in (False, True):
        folder = tmp_path / str(light)
        folder.mkdir()
        if light:  # it must not fall back
            monkeypatch.setattr(writeback, "load_dense", None)
        journal = RoundingJournal(folder, grids_of(ready))
        found.append(arrays(journal, run(ready, journal, light=light)))
    assert found[0] == found[1]


def test_a_journal_moves_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    store = RoundingJournal(tmp_path / "first", {"a.b": int_blocks(4, 32, symmetric=False)})
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    codes = requantize(weight, store.grids["a.b"], "search")
    store.put("a.b", Rounded(codes))
    moved = store.moved(tmp_path / "elsewhere")
    assert (moved["a.b"].dequantize() == codes.dequantize()).all()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="taken"):
        moved.moved(tmp_path / "taken")


def test_what_a_kill_cut_off_is_not_taken(ready: Prepared, tmp_path: Path) -> None:
    grids = grids_of(ready)
    journal = RoundingJournal(tmp_path, grids)
    run(ready, journal)
    modules = list(grids)
    (journal._place(modules[0]) / "done.json").unlink()
    (journal._place(modules[1]) / "rest.safetensors").unlink()
    codes = journal._place(modules[2]) / "0.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1] + b"?")
    (journal._place(modules[3]) / "done.json").write_bytes(b"{")
    assert set(RoundingJournal(tmp_path, grids)) == set(modules[4:])


def test_anything_that_decides_the_result_makes_another_key(
    ready: Prepared, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    grids, calibration = grids_of(ready), Calibration(WINDOWS[:4])
    model = ready.model
    other_adapter = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=9)
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.nf4.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.25
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    halved = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 0.5)]).model
    keys = [
        key_of(model, grids, calibration, True, "AutoModelForCausalLM"),
        key_of(model, grids, calibration, False, "AutoModelForCausalLM"),
        key_of(halved, grids, calibration, True, "AutoModelForCausalLM"),
        key_of(
            merging.prepare(tiny_llama.nf4, [(other_adapter, 1.0)]).model,
            grids,
            calibration,
            True,
            "AutoModelForCausalLM",
        ),
        key_of(
            merging.prepare(base, [(tiny_adapter, 1.0)]).model,
            grids,
            calibration,
            True,
            "AutoModelForCausalLM",
        ),
        key_of(model, grids | {"lm_head": int_blocks(4, 64)}, calibration, True, "AutoModelForCausalLM"),
        key_of(model, grids, Calibration(WINDOWS[:5]), True, "AutoModelForCausalLM"),
        key_of(model, grids, Calibration(WINDOWS[:4], "search"), True, "AutoModelForCausalLM"),
        key_of(model, grids, Calibration(WINDOWS[:4], follow=0.5), True, "AutoModelForCausalLM"),
        key_of(model, grids, Calibration(WINDOWS[:4], device="cpu"), True, "AutoModelForCausalLM"),
    ]
    assert len(set(keys)) == len(keys)
    again = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)]).model
    assert key_of(again, grids_of(ready), Calibration(WINDOWS[:4]), True, "AutoModelForCausalLM") == keys[0]


# Imports once what a merge needs, then does each in a child of its own. A folder to merge to, on stdin, is
# answered by the number of the child, and by how that ended.
FORKS = """
import os, sys, traceback
from pathlib import Path
import peft, torch
import vera_edge.reference.model
from vera_edge import merging
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
torch.set_num_threads(1)
base, adapter, text = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            ready = merging.prepare(Path(base), [(Path(adapter), 1.0)])
            merge_to_folder(ready, Path(line.strip()), Rounding(None, text, tokens=2048))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Merges in forks of one process."""

    def __init__(self, *inputs: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS, *map(str, inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def start(self, out: Path) -> int:
        """Begin a merge to `out`; its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """The child's number once it has begun, and its exit code once it has ended."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="merges are killed in forks")
def test_a_merge_that_is_killed_at_any_moment_ends_in_the_same_bytes(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(letters(0))
    forks = Forks(tiny_llama.nf4, tiny_adapter, text)
    forks.start(tmp_path / "whole")
    assert forks.answer() == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    out, draw = tmp_path / "out", random.Random(4)
    kept: list[int] = []
    for _ in range(2):
        child = forks.start(out)
        _until_more(child, tmp_path, kept[-1] if kept else 0)
        time.sleep(draw.uniform(0, 0.2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert forks.answer() in (0, -signal.SIGKILL)
        kept.append(_count(tmp_path))
        if out.exists():
            break
    assert any(kept), "no run was killed after it had finished something"
    if not out.exists():
        forks.start(out)
        assert forks.answer() == 0
    forks.process.communicate()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "whole", "out"}


def _count(folder: Path) -> int:
    return len(list(folder.glob(".out.partial-rounding/*/*/done.json")))


def _until_more(process: int, folder: Path, before: int) -> None:
    """Wait until it has finished something more, or is through."""
    while _count(folder) <= before:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def test_a_base_that_changed_is_rounded_anew(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, text = tmp_path / "base", tmp_path / "text.txt"
    base.mkdir()
    text.write_text(letters(0))
    for path in tiny_llama.nf4.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    own, calls = RoundingJournal.put, []

    def put(self: RoundingJournal, module: str, rounded: Rounded) -> None:
        calls.append(module)
        if len(calls) == 9:
            raise _Killed
        own(self, module, rounded)

    monkeypatch.setattr(RoundingJournal, "put", put)
    with pytest.raises(_Killed):
        merge_to_folder(
            merging.prepare(base, [(tiny_adapter, 1.0)]), tmp_path / "out", Rounding(None, str(text))
        )
    assert _count(tmp_path) == 8
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    calls.clear()
    calls += ["a"] * 100
    merge_to_folder(merging.prepare(base, [(tiny_adapter, 1.0)]), tmp_path / "out", Rounding(None, str(text)))
    assert len(calls) == 100 + 14


def test_two_runs_do_not_write_the_same_journal(ready: Prepared, tmp_path: Path) -> None:
    from vera_edge.storage.resumable import resumable_folder

    (tmp_path / "text.txt").write_text(letters(0))
    out = tmp_path / "out"
    with (
        resumable_folder(out, "rounding", "0" * 64),
        pytest.raises(OutputError, match="another"),
        Rounding(None, str(tmp_path / "text.txt")).codes(ready.model, ready.plan, out, exported=False),
    ):
        pass
