"""The bytes of a merge don't depend on where it runs, nor on how often it was killed on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.soak_merge import Merge, contents, soak
from tests import tiny
from vera_edge import merging as merge
from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.projection import ProjectionSpec, regenerate
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, OutputError, PlanError, ReadError
from vera_edge.merging import Resources, executor, memory, stage, units, work
from vera_edge.merging.cutting import cut
from vera_edge.merging.journal import Done, Journal
from vera_edge.merging.measure import Survival
from vera_edge.merging.report import LayerReport
from vera_edge.parallel import Engine
from vera_edge.plans import plan as plans
from vera_edge.storage.line_journal import line
from vera_edge.storage.lock import exclusive
from vera_edge.storage.shards import Shards
from vera_edge.trained.trained_model import TrainedModel

TWO = Resources(Engine(workers=2))


class Stopped(Exception):
    """Stands for whatever ends a run that isn't the input's fault."""


@pytest.fixture(scope="module")
def ready(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> merge.Prepared:
    return merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "fp32")


@pytest.fixture(scope="module")
def expected(ready: merge.Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    merge.perform(ready, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return contents(out)


def stop_after(ready: merge.Prepared, out: Path, units: int) -> None:
    """A run that ends when `units` are journaled."""

    def progress(what: str, done: int, total: int) -> None:
        if what == executor.WHAT:
            calls.append(done)
            if len(calls) > units:
                raise Stopped

    calls: list[int] = []
    with pytest.raises(Stopped):
        merge.perform(ready, out, progress)
    assert not out.exists()
    assert stage.folder_of(out).is_dir()


@pytest.fixture
def units_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are done in this process from here on."""
    done: list[int] = []

    def watched(job: work.MergeJob, number: int) -> Done:
        done.append(number)
        return work.do_unit(job, number)

    monkeypatch.setattr(executor, "do_unit", watched)
    return done


@pytest.mark.parametrize("to", ["fp32", "nf4"])
def test_workers_change_no_byte(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, to: str
) -> None:
    """Codes that were rounded elsewhere reach the workers too: see the test of gptq."""
    ready = merge.prepare(tiny_llama.sharded, [(tiny_adapter, 1.0)], to)
    one = merge.perform(ready, tmp_path / "one")
    two = merge.perform(ready, tmp_path / "two", resources=TWO)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.to_dict() | {"folder": ""} == two.to_dict() | {"folder": ""}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_workers_change_no_byte_of_calibrated_codes(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder

    ready = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "nf4", {"double_quant": True})
    merge_to_folder(ready, tmp_path / "one", Rounding("hqq"))
    merge_to_folder(ready, tmp_path / "two", Rounding("hqq"), resources=TWO)
    merge.perform(ready, tmp_path / "rounded")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(tmp_path / "rounded")


def test_each_adapter_alone_and_all_together(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, units_done: list[int]
) -> None:
    """The same bytes, also when a run of all is stopped in the middle and begun again."""
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", targets=["q_proj"], seed=32)
    ready = merge.prepare_each(tiny_llama.nf4, [tiny_adapter, other], to="bf16")
    for name, one in ready.items():
        merge.perform(one, tmp_path / "alone" / name)
    merges = [one.merge(tmp_path / "all" / name) for name, one in ready.items()]

    def progress(what: str, done: int, total: int) -> None:
        if what == executor.WHAT and done > total / 2 and not stopped:
            stopped.append(len(units_done))
            raise Stopped

    stopped: list[int] = []
    units_done.clear()
    with pytest.raises(Stopped):
        merge.write_each(merges, progress)
    assert not [path for path in (tmp_path / "all").iterdir() if path.name in ready]
    merge.write_each(merges, progress, resources=TWO)
    assert len(units_done) == sum(count(one) for one in ready.values())
    for name in ready:
        assert contents(tmp_path / "all" / name) == contents(tmp_path / "alone" / name)
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(ready)


def test_a_base_that_changed_under_a_run(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, units_done: list[int]
) -> None:
    """Same names and shapes, other values in two tensors: what was made of them is made again."""
    base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
    ready = merge.prepare(base, [(tiny_adapter, 1.0)], "bf16")
    stop_after(ready, tmp_path / "out", count(ready) - 1)
    assert len(units_done) == count(ready) - 1
    changed = [unit.names[0] for unit in _units(ready)][:2]
    _overwrite(ready.model.checkpoint, changed)
    units_done.clear()
    report = merge.perform(ready, tmp_path / "out")
    assert len(units_done) == 3
    assert report.base_digest == Checkpoint.open(base).digest
    merge.perform(ready, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def _overwrite(checkpoint: Checkpoint, names: list[str]) -> None:
    for name in names:
        info = checkpoint.tensors[name]
        with info.file.open("rb+") as stream:
            stream.seek(info.start)
            stream.write(bytes(info.nbytes))


def test_a_run_goes_on_where_the_last_one_ended(
    ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path, units_done: list[int]
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 5)
    first = list(units_done)
    merge.perform(ready, out)
    # the last one that was begun had been journaled as well, or else is done again
    assert len(first) == 5
    assert sorted(units_done) == sorted(set(units_done)), "done twice"
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_unit_that_the_files_do_not_hold_is_done_again(
    ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path, units_done: list[int]
) -> None:
    """As after a power cut, when the journal reached the disk and the data didn't."""
    out = tmp_path / "out"
    stop_after(ready, out, 8)
    units_done.clear()
    (file,) = stage.folder_of(out).glob("*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[:] = bytes(len(data))
    file.write_bytes(data)
    merge.perform(ready, out)
    # zeros are what some tensor may hold by right, so nearly all are done again
    assert len(units_done) >= count(ready) - 1
    assert contents(out) == expected


def count(ready: merge.Prepared) -> int:
    """The units of a merge."""
    return len(_units(ready))


def _units(ready: merge.Prepared) -> list[units.MergeUnit]:
    return cut(ready.plan, ready.model, {})[0]


@pytest.mark.parametrize("cut", [1, 7, 100, -1])
def test_a_journal_whose_end_is_torn(
    ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path, cut: int, units_done: list[int]
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 5)
    file = stage.folder_of(out) / "journal"
    whole = file.read_bytes()
    torn = whole[:-cut] if cut > 0 else whole[:-30] + b"x" + whole[-29:]
    file.write_bytes(torn + (b"\0" * 40 if cut == 7 else b""))
    units_done.clear()
    merge.perform(ready, out, resources=merge.ONE_PROCESS)
    assert len(units_done) > 0
    assert contents(out) == expected


def test_half_written_side_files_do_not_stay(
    ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A kill in the middle of an atomic write leaves its temporary file."""
    out = tmp_path / "out"
    stop_after(ready, out, 5)
    (files,) = (path for path in stage.folder_of(out).iterdir() if path.is_dir())
    (files / ".README.md.partial-k3x").write_text("# my")
    (files / "1_Pooling").mkdir()
    (files / "1_Pooling" / "config.json").write_text("{")
    (files / "config.json").write_text("{")
    merge.perform(ready, out)
    assert contents(out) == expected


@pytest.mark.parametrize("what", ["plan", "base", "version"])
def test_what_another_merge_left_is_not_taken_up(
    ready: merge.Prepared,
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
    what: str,
    units_done: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 5)
    other = ready
    if what == "plan":
        other = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 0.5)], "fp32")
    if what == "base":  # of the same names and shapes
        other = merge.prepare(tiny_llama.fp32, [(tiny_adapter, 1.0)], "fp32")
    if what == "version":
        monkeypatch.setattr(work, "__version__", "0.0.0")
    units_done.clear()
    merge.perform(other, out)
    assert len(units_done) == len(set(units_done)) == count(other)
    merge.perform(other, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alone"}


def test_a_refused_input_leaves_nothing_of_an_earlier_run(
    ready: merge.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 5)

    def refuse(job: work.MergeJob, number: int) -> Done:
        raise CheckpointError("damaged")

    monkeypatch.setattr(executor, "do_unit", refuse)
    with pytest.raises(CheckpointError):
        merge.perform(ready, out)
    assert not list(tmp_path.iterdir())


def test_a_base_that_cannot_be_read_for_a_while(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, units_done: list[int]
) -> None:
    """It's the base's fault, not the output's, and what was finished is there for the next run."""
    base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
    ready, out = merge.prepare(base, [(tiny_adapter, 1.0)], "fp32"), tmp_path / "out"
    file, gone = base / "model.safetensors", tmp_path / "gone"

    def progress(what: str, done: int, total: int) -> None:
        if what == executor.WHAT and len(units_done) == 5:
            file.rename(gone)

    with pytest.raises(ReadError, match=r"model\.safetensors can't be read: No such file") as error:
        merge.perform(ready, out, progress)
    assert "write" not in str(error.value)
    gone.rename(file)
    finished = len(units_done)
    merge.perform(ready, out)
    assert len(units_done) - finished < count(ready) - 3
    merge.perform(ready, tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")


def test_a_side_file_of_the_base_that_cannot_be_read(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
    (base / "generation_config.json").write_text("{}")
    ready = merge.prepare(base, [(tiny_adapter, 1.0)], "fp32")
    (base / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json can't be read"):
        merge.perform(ready, tmp_path / "out")


@pytest.mark.parametrize("where", ["before", "on the way", "at the end"])
def test_a_disk_that_is_full_keeps_what_is_finished(
    ready: merge.Prepared,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    units_done: list[int],
    where: str,
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 5)
    finished = len(units_done)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "before":
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
            patch.setattr(executor, "_allocated", lambda _: 0)
        elif where == "on the way":
            patch.setattr(Shards, "put_bytes", full)
        else:
            patch.setattr(executor, "_write_beside", full)
        with pytest.raises(OutputError, match="free some"):
            merge.perform(ready, out)
    merge.perform(ready, out)
    assert len(units_done) - finished <= count(ready) + 1
    assert contents(out) == expected


def test_a_run_that_begins_does_not_take_the_stage_of_one_at_work(
    ready: merge.Prepared, tmp_path: Path
) -> None:
    """Of one that has its lock and no folder of files yet, or no more."""
    out = tmp_path / "out"
    out.mkdir()
    folder = stage.folder_of(out)
    folder.mkdir()
    with exclusive(folder / "lock", "merge"):
        with pytest.raises(OutputError, match="another merge"):
            merge.perform(ready, out, force=True)
        assert (folder / "lock").exists()


def test_a_target_that_was_being_replaced_at_a_kill_is_put_back(
    ready: merge.Prepared, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop_after(ready, out, 2)
    old = tmp_path / ".out.partial-old-77"
    old.mkdir()
    (old / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="isn't empty"):
        merge.perform(ready, out)
    assert (out / "mine.txt").read_text() == "keep"
    merge.perform(ready, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_merges_into_one_target(ready: merge.Prepared, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if 0 < done < total and not refused:
            with pytest.raises(OutputError, match=r"another merge into .* is at work") as error:
                merge.perform(ready, tmp_path / "out")
            refused.append(error.value)

    refused: list[OutputError] = []
    merge.perform(ready, tmp_path / "out", progress)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_result_stays_until_the_new_one_is_whole(
    ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(Stopped):
        merge.perform(ready, out, _stop_at_once, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    merge.perform(ready, out, force=True)
    assert contents(out) == expected


def _stop_at_once(what: str, done: int, total: int) -> None:
    raise Stopped


@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_random_moments_lose_nothing(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, workers: int
) -> None:
    """The command's own process, by SIGKILL; workers end with it."""
    made = Merge(tiny_llama.sharded, tiny_adapter, tmp_path, ("--to", "bf16"), workers)
    kills = 8 if workers == 1 else 4  # scripts/soak_merge.py makes more of them
    found = soak(made, kills, seed=workers)
    assert found.kills >= kills
    assert found.resumed > 0, "no kill fell while units were being written"
    assert found.strays == 0


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vera_edge.parallel import Engine\n"
        "from tests.unit.merging.test_resume import wait_long\n"
        "if __name__ == '__main__':\n"
        "    list(Engine(workers=2).map(wait_long, [Path(sys.argv[1]) / 'a', Path(sys.argv[1]) / 'b']))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    marks = [tmp_path / "a", tmp_path / "b"]
    _until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not any(_runs(int(mark.read_text())) for mark in marks))


def wait_long(mark: Path) -> None:
    mark.write_text(str(os.getpid()))
    time.sleep(300)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until(true: object) -> None:
    assert callable(true)
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited a minute"
        time.sleep(0.05)


class TestMemory:
    """--max-memory bounds the units at work, by what their layouts say."""

    def test_the_result_is_the_same(
        self, ready: merge.Prepared, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        merge.perform(ready, tmp_path / "out", resources=Resources(Engine(workers=2), 200 << 20))
        assert contents(tmp_path / "out") == expected

    def test_a_unit_that_cannot_fit(self, ready: merge.Prepared, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r"--max-memory allows 20 MB, and \S+ alone takes"):
            merge.perform(ready, tmp_path / "out", resources=Resources(Engine(), 20_000_000))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "to", ["same", "fp32", "bf16", "nf4", "fp4", "int8", "gptq", "gptq8", "awq", "w4a16", "w8a8", "fp8"]
    )
    def test_no_unit_takes_more_than_its_estimate(self, tmp_path: Path, to: str) -> None:
        rng = np.random.default_rng(1)
        weight = rng.standard_normal((1024, 1024)).astype(np.float32)
        save_file({"layers.0.fc.weight": weight}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "made"}')
        checkpoint = Checkpoint.open(tmp_path)
        vectors = LambdaVectors(weight[0], weight[1, :64].copy())
        adapter = Adapter(tmp_path, "a", None, 64, 7, {"layers.0.fc": vectors}, None, {}, {}, {}, None, "0")
        projections = regenerate(ProjectionSpec(3, 64, 1024, 1024))
        model = TrainedModel(checkpoint, (WeightedAdapter(adapter, 1.0),), projections)
        plan = plans.make(checkpoint, model.adapters, weights=to, projections=projections)
        job = work.MergeJob("key", plan, model, {}, tmp_path / "out", 1 << 30)
        (tmp_path / "out").mkdir()
        job.shards.create()
        (unit,) = job.units
        tracemalloc.start()
        try:
            done = work.do_unit(job, 0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert work.is_there(job, done)
        assert peak < memory.unit_peak(job, unit)


class TestJournal:
    """What is read back is what was written, or less."""

    entries = tuple(
        Done(
            number,
            f"{number:064x}",
            {"a.weight": "0" * 64},
            LayerReport("a", "nf4", "fp32", Survival(0.1, 1 / 3, 1e-300, 2.5)),
        )
        for number in range(6)
    )

    def written(self, path: Path) -> bytes:
        with Journal(path, "key") as journal:
            for done in self.entries:
                journal.add(done)
        return path.read_bytes()

    def test_every_cut_and_every_flipped_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        whole = self.written(path)
        rng = random.Random(3)
        places = rng.sample(range(len(whole)), 150)
        for damaged in [whole[:n] for n in places] + [
            whole[:n] + bytes([whole[n] ^ 1 << rng.randrange(8)]) + whole[n + 1 :] for n in places
        ]:
            path.write_bytes(damaged)
            with Journal(path, "key") as journal:
                found = dict(journal.done)
                assert list(found.values()) == list(self.entries[: len(found)])
                for done in self.entries[len(found) :]:
                    journal.add(done)
            assert path.read_bytes() == whole

    def test_of_another_key(self, tmp_path: Path) -> None:
        self.written(tmp_path / "journal")
        with Journal(tmp_path / "journal", "other") as journal:
            assert not journal.done
        assert (tmp_path / "journal").read_bytes() == line({"merge": "other"})

    def test_lines_are_json(self, tmp_path: Path) -> None:
        rows = self.written(tmp_path / "journal").splitlines()
        assert [json.loads(row.split(b" ", 1)[1])["unit"] for row in rows[1:]] == list(range(6))
