"""A release killed, starved of disk, doubled, or fed rubbish: nothing is lost, nothing half published."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.conftest import ROOT, Cli
from vera_edge.bundle import contents as bundle
from vera_edge.storage.files import PARTIAL_MARK

NAME = "onnx-branch-nf4"
VARIANT = (
    '[[variant]]\nmode = "branch"\nweights = "nf4"\n[limits]\ndata = "t.txt"\nwindow = 16\ntokens = 128\n'
)


def recipe(*adapters: str) -> str:
    """A recipe of these adapters, without golden vectors."""
    entries = "".join(f'[[adapter]]\nid = "{name}"\nbase = "tiny"\npath = "{name}"\n' for name in adapters)
    head = '[release]\nname = "tiny"\ngolden = false\n[[base]]\nid = "tiny"\npath = "nf4"\n'
    return head + entries + VARIANT


class Forks:
    """`vera-edge` in forks of a process that has imported everything; see tests/forked_cli.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_cli"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(self, *words: object, **more: Any) -> tuple[int, Path]:
        """Begin a command; its process and the file of what it says."""
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        order = {"words": [str(word) for word in words], "log": str(log), **more}
        return int(self._order(do="start", **order)["pid"]), log

    def wait(self, pid: int) -> int:
        return int(self._order(do="wait", pid=pid)["status"])

    def run(self, *words: object, **more: Any) -> tuple[int, str]:
        """Do a command; its exit code and what it says."""
        pid, log = self.start(*words, **more)
        return self.wait(pid), log.read_text()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def strays(*folders: Path) -> list[str]:
    """What killed writers left."""
    return [str(path) for folder in folders for path in folder.rglob("*") if PARTIAL_MARK in path.name]


def check_published(out: Path) -> None:
    """Every folder that looks like a bundle is one."""
    for folder in out.glob("*/*"):
        if folder.is_dir() and folder.parent.name != "rejected" and not folder.name.startswith("."):
            bundle.verify(folder)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def inputs(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "inputs"
    folder.mkdir()
    shutil.copytree(tiny_llama.nf4, folder / "nf4")
    for number, name in enumerate(("a", "b")):
        tiny.make_adapter(tiny_llama.nf4, folder / name, vectors_seed=5 + number)
    (folder / "t.txt").write_text(tiny.TEXT * 2)
    (folder / "r.toml").write_text(recipe("a", "b"))
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, forks: Forks) -> Path:
    """A folder with the release as it comes out undisturbed, `out`, and its store."""
    folder = inputs.parent / "whole"
    words = ("release", inputs / "r.toml", "-o", folder / "out", "--store", folder / "store", "-q")
    status, said = forks.run(*words, count=str(inputs.parent / "count"))
    assert status == 0, said
    return folder


def begun(whole: Path, folder: Path) -> Path:
    """A store in which only the base's graph is finished: the long part of a tiny release."""
    store = folder / "store"
    shutil.copytree(whole / "store", store)
    for note in store.glob("*/*/facts.json"):
        if json.loads(note.read_bytes())["facts"]["stage"] != "graph":
            shutil.rmtree(note.parent)
    return store


def test_a_kill_at_any_write_costs_time_and_nothing_else(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    """With VERA_EDGE_ALL_KILLS at every single write, else at a few of them."""
    warm = begun(whole, tmp_path / "warm")
    words = ("release", inputs / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store", "-q")
    shutil.copytree(warm, tmp_path / "store")
    assert forks.run(*words, count=str(tmp_path / "count"))[0] == 0
    last = int((tmp_path / "count").read_text())
    assert last > 50
    every = range(1, last + 1)
    chosen = every if os.environ.get("VERA_EDGE_ALL_KILLS") else random.Random(last).sample(every, 6)
    for number in chosen:
        for name in ("out", "store"):
            shutil.rmtree(tmp_path / name)
        shutil.copytree(warm, tmp_path / "store")
        status, said = forks.run(*words, kill_at=number)
        assert status == -signal.SIGKILL, (number, said)
        check_published(tmp_path / "out")
        status, said = forks.run(*words)
        assert status == 0, (number, said)
        assert content(tmp_path / "out") == content(whole / "out"), number
        assert strays(tmp_path / "out", tmp_path / "store") == [], number


def test_a_kill_at_any_moment_costs_time_and_nothing_else(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    """By the clock and not by the write; each run goes on where the killed one was.

    VERA_EDGE_KILLS is how many; then the base's graph isn't finished to begin with either.
    """
    out, store, rng = tmp_path / "out", tmp_path / "store", random.Random(7)
    kills = int(os.environ.get("VERA_EDGE_KILLS", "0"))
    warm = (tmp_path / "nothing") if kills else begun(whole, tmp_path / "warm")
    words = ("release", inputs / "r.toml", "-o", out, "--store", store, "-q")
    hits, took = 0, 0.0
    while hits < (kills or 4):
        if not store.exists() and warm.exists():
            shutil.copytree(warm, store)
        at = time.monotonic()
        pid, log = forks.start(*words)
        if took:
            time.sleep(rng.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
        status = forks.wait(pid)
        check_published(out)
        if status == 0:
            took = took or time.monotonic() - at
            assert content(out) == content(whole / "out")
            assert strays(out, store) == []
            for folder in (out, store):
                shutil.rmtree(folder)
        else:
            assert status == -signal.SIGKILL, log.read_text()
            hits += 1
    status, said = forks.run(*words)
    assert status == 0, said
    assert content(out) == content(whole / "out")
    assert strays(out, store) == []


def test_a_published_bundle_is_there_whenever_its_successor_is_killed(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    """At any moment of a run that replaces it the bundle is the old one or the new one."""
    for name in ("out", "store"):
        shutil.copytree(whole / name, tmp_path / name)
    again = inputs / "again.toml"
    again.write_text(recipe("a").replace('name = "tiny"\ngolden', 'name = "tiny"\nversion = "2"\ngolden'))
    words = ("release", again, "-o", tmp_path / "out", "--store", tmp_path / "store", "-q")
    old, new = bundle.read(whole / "out" / "a" / NAME).digest, None
    for number in range(1, 200, 3):
        status, said = forks.run(*words, kill_at=number)
        now = bundle.verify(tmp_path / "out" / "a" / NAME).digest
        if status == 0:
            break
        assert status == -signal.SIGKILL, said
        new = now if now != old else new
        assert now in (old, new)
    assert status == 0 and now == new and new != old
    assert strays(tmp_path / "out") == []


def test_two_releases_at_once_make_everything_once(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    begun(whole, tmp_path)
    words = ("release", inputs / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    runs = [forks.start(*words) for _ in range(3)]
    assert [forks.wait(pid) for pid, _ in runs] == [0, 0, 0], [log.read_text() for _, log in runs]
    said = "".join(log.read_text() for _, log in runs)
    assert said.count("built ") == 2 and said.count("unchanged ") == 4
    assert content(tmp_path / "out") == content(whole / "out")
    assert strays(tmp_path / "out", tmp_path / "store") == []


@pytest.mark.parametrize(
    ("size", "only_out"), [(60_000, False), (400_000, False), (800_000, False), (400_000, True)]
)
def test_a_full_disk_publishes_nothing_half_and_the_next_run_finishes(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path, size: int, only_out: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    store = begun(whole, tmp_path) if only_out else disk / "store"
    words = ("release", inputs / "r.toml", "-o", disk / "out", "--store", store, "-q")
    more = {"after": str(tmp_path / "after"), "finally": str(tmp_path / "finally")}
    status, said = forks.run(*words, disk=str(disk), size=size, grown=64_000_000, **more)
    assert "exit 2; the disk has grown" in said, said
    assert any(
        words in said for words in ("no space left on the disk", "grows past the file size", "the disk of")
    )
    check_published(tmp_path / "after" / "out")
    assert status == 0, said
    assert content(tmp_path / "finally" / "out") == content(whole / "out")
    assert strays(tmp_path / "finally") == []


def test_clocks_decide_nothing(inputs: Path, whole: Path, tmp_path: Path, cli: Cli) -> None:
    """Every time stamp of inputs, store and output set to the past or the future: nothing is made again."""
    for name in ("out", "store"):
        shutil.copytree(whole / name, tmp_path / name)
    shutil.copytree(inputs, tmp_path / "inputs")
    rng, now = random.Random(1), time.time()
    for path in [*tmp_path.rglob("*"), tmp_path / "store"]:
        moment = now + rng.choice((-1, 1)) * rng.uniform(0, 10**9)
        os.utime(path, (moment, moment))
    result = cli(
        "release", tmp_path / "inputs" / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store"
    )
    assert result.exit_code == 0 and result.stderr.count("unchanged") == 2
    assert content(tmp_path / "out") == content(whole / "out")


def test_a_clock_that_jumps_while_releases_run_decides_nothing(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    """By two hours at every look, in two releases that wait for each other."""
    shutil.copytree(inputs, tmp_path / "inputs")  # no file of which is old enough to be known
    words = ("release", tmp_path / "inputs" / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    runs = [forks.start(*words, clock=step) for step in (3600, -3600)]
    assert [forks.wait(pid) for pid, _ in runs] == [0, 0], [log.read_text() for _, log in runs]
    said = "".join(log.read_text() for _, log in runs)
    assert said.count("built ") == 2 and said.count("unchanged ") == 2
    assert content(tmp_path / "out") == content(whole / "out")
    assert strays(tmp_path / "out", tmp_path / "store") == []


def test_a_read_only_output_is_told_before_the_work(
    inputs: Path, whole: Path, forks: Forks, tmp_path: Path
) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    out.mkdir()
    words = ("release", inputs / "r.toml", "-o", out, "--store", store, "-q")
    status, said = forks.run(*words, read_only=str(out))
    assert status == 2 and f"{out} can't be written; make it writable, or choose another -o" in said
    assert list(out.iterdir()) == []
    assert not any(path.suffix == ".lock" for path in store.glob("*/*")), "work was begun"
    out.chmod(0o755)


def test_a_finished_release_may_be_read_only(inputs: Path, whole: Path, forks: Forks, tmp_path: Path) -> None:
    """What is published is all that a second run reads, the store isn't asked."""
    shutil.copytree(whole / "out", tmp_path / "out")
    words = ("release", inputs / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "none", "-q")
    status, said = forks.run(*words, read_only=str(tmp_path / "out"))
    assert status == 0 and said.count("unchanged ") == 2, said


def test_unreadable_adapters_among_fifty(
    inputs: Path, whole: Path, tiny_llama: tiny.TinyLlama, forks: Forks, tmp_path: Path
) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name in ("nf4", "t.txt"):
        (folder / name).symlink_to(inputs / name)
    names = [f"n{number:02}" for number in range(50)]
    for name in names:
        shutil.copytree(inputs / ("a" if int(name[1:]) % 2 else "b"), folder / name)
    cut = folder / "n21" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    (folder / "n22" / "adapter_config.json").write_text("{")
    shutil.rmtree(folder / "n23")
    cut = folder / "n24" / "adapter_model.safetensors"
    cut.unlink()
    cut.mkdir()
    (folder / "r.toml").write_text(recipe(*names))
    out = tmp_path / "out"
    words = ("release", folder / "r.toml", "-o", out, "--store", whole / "store", "-q")
    status, said = forks.run(*words)
    assert status == 2 and "4 of 50 bundles failed: n21/" in said and "Traceback" not in said
    entries = json.loads((out / "release.json").read_bytes())["bundles"]
    failed = {entry["name"]: entry["message"] for entry in entries if entry["state"] != "ok"}
    assert list(failed) == [f"n{number}/{NAME}" for number in (21, 22, 23, 24)]
    for name, message in failed.items():
        assert str(folder / name.partition("/")[0]) in message
    assert len(list(out.glob("n*/*/vera_edge.json"))) == 46
    assert bundle.verify(out / "n49" / NAME).digest
    # What failed is mended, and only that is made.
    for number in (21, 22, 23, 24):
        shutil.rmtree(folder / f"n{number}", ignore_errors=True)
        shutil.copytree(inputs / "a", folder / f"n{number}")
    status, said = forks.run(*words)
    assert status == 0 and said.count("built ") == 4 and said.count("unchanged ") == 46
