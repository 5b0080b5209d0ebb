"""The same work on a real local Ray cluster of two nodes, one of which is killed while it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.soak_merge import contents
from tests import foreign_code, tiny
from tests.conftest import Cli
from tests.integration.test_release_faults import recipe
from vera_edge import merging as merge
from vera_edge.errors import PlanError, VeraEdgeError
from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.measuring.assess_each import assess_each, assess_several
from vera_edge.parallel import Engine
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folders


def slow_square(item: tuple[Path, int]) -> int:
    folder, number = item
    (folder / f"begun-{number}").touch()
    time.sleep(0.5)
    return number * number


def size_of(number: int) -> int:
    import numpy

    return int(numpy.zeros(number).size)


def cores_given(shared: None, number: int) -> float:
    import ray

    return float(ray.get_runtime_context().get_assigned_resources()["CPU"])


def cores_of(number: int) -> float:
    return cores_given(None, number)


def refuse(number: int) -> int:
    raise PlanError("refused on a worker")


@contextmanager
def one_node() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def cluster() -> Iterator[Any]:
    with one_node() as made:
        yield made


@pytest.fixture(scope="module")
def steady_cluster() -> Iterator[Any]:
    """For tests that take no node away: starting a cluster, and torch in its workers, is what they cost."""
    with one_node() as made:
        yield made


def test_a_killed_node_costs_time_and_nothing_else(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(num_cpus=2)
    items = [(tmp_path, number) for number in range(8)]
    found = {}
    for index, result in Engine("ray", address=cluster.address).map(slow_square, items):
        if second is not None:
            cluster.remove_node(second, allow_graceful=False)
            second = None
        found[index] = result
    assert found == {number: number**2 for number in range(8)}


def test_an_error_of_ours_passes_through(steady_cluster: Any) -> None:
    with pytest.raises(PlanError, match="refused on a worker"):
        list(Engine("ray", address=steady_cluster.address).map(refuse, [1]))


def test_workers_import_nothing_from_the_folder_that_ray_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts that folder first on its workers' path."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign_code.plant(folder, tmp_path / "marks")
    monkeypatch.chdir(folder)
    assert dict(Engine("ray").map(size_of, [1, 2])) == {0: 1, 1: 2}
    assert foreign_code.marks_in(tmp_path / "marks") == []
    assert Path.cwd() == folder


def test_merges_on_a_cluster_that_loses_a_node(
    cluster: Any, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Two adapters over one base: the bytes are those of merging each alone, in this process."""
    ready = {"one": merge.prepare(tiny_llama.sharded, [(tiny_adapter, 1.0)], "nf4")}
    ready["other"] = merge.prepare(tiny_llama.sharded, [(tiny_adapter, -0.5)], "nf4")
    for name, one in ready.items():
        merge.perform(one, tmp_path / "here" / name)
    nodes = [cluster.add_node(num_cpus=2)]

    def progress(what: str, done: int, total: int) -> None:
        if done and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    on_ray = merge.Resources(Engine("ray", address=cluster.address), max_memory=2 << 30)
    merges = [one.merge(tmp_path / "there" / name) for name, one in ready.items()]
    merge.write_each(merges, progress, resources=on_ray)
    assert not nodes
    for name in ready:
        assert contents(tmp_path / "here" / name) == contents(tmp_path / "there" / name)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"one", "other"}


def test_calibrations_on_a_cluster_that_loses_a_node(
    cluster: Any, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Four variants of one base, some of which are calibrated on a node that goes while they are at it."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 20)
    rounding, weights = Rounding("gptq", str(text)), (1.0, -0.5, 0.25, 2.0)
    ready = [merge.prepare(tiny_llama.sharded, [(tiny_adapter, weight)], "nf4") for weight in weights]

    def places(where: str) -> dict[Path, merge.Prepared]:
        return {tmp_path / where / str(number): one for number, one in enumerate(ready)}

    merge_to_folders(places("here"), rounding)
    node, lost = cluster.add_node(num_cpus=3), threading.Event()

    def lose_the_node() -> None:
        while len(list((tmp_path / "there").glob(".*/.try-*"))) < 3 and not lost.is_set():
            time.sleep(0.01)
        lost.set()
        cluster.remove_node(node, allow_graceful=False)

    losing = threading.Thread(target=lose_the_node)
    losing.start()
    told: list[tuple[str, int, int]] = []
    on_ray = merge.Resources(Engine("ray", address=cluster.address))
    merge_to_folders(places("there"), rounding, lambda *step: told.append(step), resources=on_ray)
    assert lost.is_set()
    losing.join()
    assert [step[1:] for step in told if step[0].startswith("calibrating")] == [(n, 4) for n in range(1, 5)]
    for number in range(len(ready)):
        assert contents(tmp_path / "here" / str(number)) == contents(tmp_path / "there" / str(number))
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"0", "1", "2", "3"}


def test_drift_of_many_artefacts_on_a_cluster(
    steady_cluster: Any,
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reports are those of measuring each here, and an artefact at fault is told of in a sentence."""
    for to in ("fp32", "int8", "nf4"):
        merge.to_folder(tiny_llama.fp32, [(tiny_adapter, 1.0)], tmp_path / to, to)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 20)
    monkeypatch.chdir(tmp_path)

    def requests(folder: Path) -> list[DriftRequest]:
        text, base = str(folder / "text.txt"), tiny_llama.fp32
        return [
            DriftRequest(tiny_adapter, folder / to, text, base, tokens=512, window=64, exact=True)
            for to in ("fp32", "int8", "nf4")
        ]

    here = {number: assess_any(request) for number, request in enumerate(requests(tmp_path))}
    on_ray = Engine("ray", address=steady_cluster.address)
    names = [Path("fp32"), Path("int8"), Path("nf4")]
    found = assess_several(requests(Path())[1], names, on_ray)
    assert dict(enumerate(found)) == here
    assert assess_several(requests(tmp_path)[1], [tmp_path / name for name in names], Engine()) == list(found)
    with pytest.raises(VeraEdgeError, match="nowhere"):
        list(assess_each([replace(requests(Path())[0], candidate=Path("nowhere"))], on_ray))


def test_an_item_for_a_whole_machine_has_all_cores_of_the_smallest(cluster: Any) -> None:
    cluster.remove_node(cluster.head_node)
    cluster.add_node(num_cpus=2, include_dashboard=False)
    cluster.add_node(num_cpus=3)
    engine = Engine("ray", address=cluster.address)
    found = engine.map_with(cores_given, None, range(3), whole_machine=True)
    assert {cores for _, cores in found} == {2.0}
    assert {cores for _, cores in engine.map(cores_of, range(2))} == {1.0}


def test_a_release_on_a_cluster_has_the_bytes_of_one_made_here(
    steady_cluster: Any, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "nf4").symlink_to(tiny_llama.nf4)
    tiny.make_adapter(tiny_llama.nf4, inputs / "a")
    (inputs / "t.txt").write_text(tiny.TEXT * 2)
    (inputs / "r.toml").write_text(recipe("a"))
    for place, words in (
        ("here", ()),
        ("there", ("--engine", "ray", "--ray-address", steady_cluster.address)),
    ):
        out = ("-o", tmp_path / place / "out", "--store", tmp_path / place / "store")
        result = cli("release", inputs / "r.toml", *out, *words)
        assert result.exit_code == 0 and result.stderr.count("built") == 1, result.stderr
    assert contents(tmp_path / "here" / "out") == contents(tmp_path / "there" / "out")
