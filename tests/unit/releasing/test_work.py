"""A bundle of a release that ends in an error nobody foresaw is one that failed; the others are made."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import NoReturn

import pytest

from tests import tiny
from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.errors import VeraEdgeError
from vera_edge.exporting import target
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.parallel import Engine
from vera_edge.releasing import run as releases

RECIPE = """
[release]
name = "tiny"
golden = false
[[base]]
id = "tiny"
path = "base"
[[adapter]]
id = "a"
base = "tiny"
path = "a"
[[variant]]
target = "broken"
weights = "fp32"
[[variant]]
weights = "fp32"
[limits]
data = "t.txt"
tokens = 512
window = 32
"""


class Broken:
    """A target with a bug."""

    name = "broken"

    def export(self, request: ExportRequest) -> Export:
        request.progress("exporting", 0, 1)
        return self._lookup()

    def _lookup(self) -> NoReturn:
        raise KeyError("model.layers.7")


BROKEN = Broken()


@pytest.fixture
def recipe(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    point = EntryPoint("broken", f"{__name__}:BROKEN", target.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: BROKEN if self.name == "broken" else _load(self))
    found = EntryPoints([point, *entry_points(group=target.GROUP)])
    monkeypatch.setattr(target, "entry_points", lambda group: found)
    shutil.copytree(tiny_llama.nf4, tmp_path / "base")
    shutil.copytree(tiny_adapter, tmp_path / "a")
    (tmp_path / "t.txt").write_text(tiny.TEXT * 8)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


_load = EntryPoint.load


def test_an_error_that_nobody_foresaw_ends_its_own_bundle_alone(
    recipe: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    made = cli("release", recipe, "-o", out, "--store", tmp_path / "store")
    assert made.exit_code == 2
    assert "1 of 2 bundles failed: a/broken-merged-fp32" in made.stderr
    assert "KeyError: 'model.layers.7'" in made.stderr
    assert "Traceback (most recent call last)" in made.stderr and "in _lookup" in made.stderr
    assert bundle.verify(out / "a" / "onnx-merged-fp32").mode == "merged"
    index = {entry["name"]: entry for entry in json.loads((out / "release.json").read_bytes())["bundles"]}
    assert index["a/onnx-merged-fp32"]["state"] == "ok"
    broken = index["a/broken-merged-fp32"]
    assert broken["state"] == "failed" and "Traceback" not in json.dumps(broken)
    assert not (out / "a" / "broken-merged-fp32").exists()
    assert 'errors="1"' in (out / "junit.xml").read_text()


def test_from_python_it_is_a_result_that_says_where(recipe: Path, tmp_path: Path) -> None:
    made = releases.release(recipe, tmp_path / "out", Engine(), tmp_path / "store")
    failed, built = made.results
    assert (failed.state, built.state) == ("failed", "built")
    assert "in _lookup" in failed.trace and built.trace == ""
    with pytest.raises(VeraEdgeError, match="1 of 2 bundles failed"):
        made.raise_when_incomplete()


COMBINED = """
[release]
name = "tiny"
golden = false
[[base]]
id = "tiny"
path = "base"
[[adapter]]
id = "mix"
base = "tiny"
combine = [{ path = "a", weight = 0.7 }, { path = "b", weight = -0.4 }]
combination = "dare_ties_svd"
density = 0.5
seed = 3
[[variant]]
weights = "fp32"
mode = "branch"
[limits]
data = "t.txt"
tokens = 512
window = 32
min_retained = 0.99
"""


def test_a_combination_is_released_and_made_again(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(tiny_llama.nf4, tmp_path / "base")
    shutil.copytree(tiny_adapter, tmp_path / "a")
    tiny.make_adapter(tmp_path / "base", tmp_path / "b", vectors_seed=6)
    (tmp_path / "t.txt").write_text(tiny.TEXT * 8)
    (tmp_path / "r.toml").write_text(COMBINED)
    made = cli("release", tmp_path / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert made.exit_code == 0, made.stderr
    found = tmp_path / "out" / "mix" / "onnx-branch-fp32"
    statement = json.loads((found / "evidence" / "provenance.json").read_text())
    told = statement["predicate"]["buildDefinition"]["externalParameters"]["combination"]
    assert [one["weight"] for one in told["adapters"]] == [0.7, -0.4] and told["combination"]["seed"] == 3
    again = cli("release", tmp_path / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "other")
    assert again.exit_code == 0 and "unchanged" in again.stdout + again.stderr
    rebuilt = cli("release", "rebuild", found, "--inputs", tmp_path)
    assert rebuilt.exit_code == 0, rebuilt.stderr
