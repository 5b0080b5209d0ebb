"""An export that is run in parts gives what it gives whole, in the memory of a part.

Of every family: `tests.exported.assert_same_in_parts`, which the tests of exports call.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import exported, tiny
from tests.peaks import llama, peaks
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError
from vera_edge.exporting import target
from vera_edge.measuring.continuations import _greedy
from vera_edge.measuring.exported_parts import COPIES, PartedExport
from vera_edge.measuring.graph_file import GraphFile
from vera_edge.storage.spill import KeptArrays, Room


@pytest.fixture(scope="module")
def branch(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("branch") / "out"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4")
    return out


def test_several_adapters_share_one_pass(branch: Path) -> None:
    """In its own order, each on as many windows as it's asked for."""
    session, parts = Session.open(branch, four_bit="kept"), PartedExport.open(branch, most=1)
    windows = [exported.tokens(count, seed=count) for count in (30, 12, 21)]
    found = list(parts.logits_together([parts, parts.without_adapter()], windows, [None, 2]))
    assert [len(row) for row in found] == [2, 2, 1]
    for place, adapter in enumerate(("default", None)):
        session.swap(adapter)
        for window, row in zip(windows, found, strict=True):
            if place < len(row):
                np.testing.assert_array_equal(row[place], session.logits(window))
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1


def test_what_is_handed_on_may_lie_on_the_disk(branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = PartedExport.open(branch, most=1)
    window = exported.tokens(30)
    truth, written = parts.logits(window), list[int]()
    own = KeptArrays.__setitem__

    def put(self: KeptArrays, key: object, array: np.ndarray) -> None:
        own(self, key, array)
        written.append(len(self._file))

    monkeypatch.setattr(KeptArrays, "__setitem__", put)
    np.testing.assert_array_equal(replace(parts, room=100).logits(window), truth)
    assert max(written) > 1


def test_arrays_that_are_dropped_give_their_place_back() -> None:
    kept = KeptArrays(Room(100))
    arrays = {key: np.random.default_rng(key).standard_normal(20).astype(np.float32) for key in range(4)}
    kept[0] = arrays[0]
    for key in (1, 2):
        kept[key] = arrays[key]
    kept.drop(1)
    kept[3] = arrays[3]
    assert 1 not in kept and kept._file._end == 160
    for key in (0, 2, 3):
        np.testing.assert_array_equal(kept[key], arrays[key])
    kept.drop(0)
    assert kept._room.left == 100


def test_a_text_is_continued_as_the_whole_continues_it(branch: Path) -> None:
    session, parts = Session.open(branch, four_bit="kept"), PartedExport.open(branch, most=1)
    prompts = [exported.tokens(9, seed=1), exported.tokens(4, seed=2)]
    found = parts.greedy_of(prompts, 3, ())
    assert found == [_greedy(session, prompt, 3) for prompt in prompts]
    ends = (found[0][0],)
    assert parts.greedy_of(prompts, 3, ends)[0] == found[0][:1]


def test_parts_take_no_more_than_asked_where_layers_do_not(branch: Path) -> None:
    alone = PartedExport.open(branch, most=1).parts
    most = sum(part.size for part in alone[:2])
    parts = PartedExport.open(branch, most=most).parts
    assert [part.size <= most for part in parts] == [True] * len(parts) and len(parts) < len(alone)
    weights = GraphFile.read(branch / "onnx" / "model.onnx").weights
    assert frozenset().union(*(part.weights for part in parts)) == weights.keys()
    assert len(PartedExport.open(branch).parts) == 1
    needed = COPIES * max(part.size for part in alone)
    assert PartedExport.open(branch, max_memory=needed).parts
    said = f"takes {needed / 1e6:.1f} MB in ONNX Runtime"
    with pytest.raises(BundleError, match=re.escape(said)):
        PartedExport.open(branch, max_memory=needed - 1)


_FEW, _MANY = 2, 6
_WIDTH, _INNER = 512, 1536
_LAYER = 4 * (2 * _WIDTH**2 + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INNER)  # bytes
_IMPORTS = """
import numpy as np
from vera_edge.device.runtime.session import Session
from vera_edge.measuring.exported_parts import PartedExport
"""
_WORK = """
window = np.arange(3, 67)
if job[1] == "whole":
    Session.open(job[0]).logits(window)
else:
    list(PartedExport.open(Path(job[0]), most=1).logits_of([window, window]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    for layers in (_FEW, _MANY):
        base = tiny.save(llama(layers, _WIDTH, _INNER), tmp_path / f"base{layers}")
        adapter = tiny.make_adapter(base, tmp_path / f"adapter{layers}", targets=["q_proj"])
        target.export(base, [(adapter, 1.0)], tmp_path / f"out{layers}", weights="fp32")
    jobs = [(_FEW, "parts"), (_MANY, "parts"), (_FEW, "whole"), (_MANY, "whole")]
    told = [[str(tmp_path / f"out{layers}"), how] for layers, how in jobs]
    few, many, whole_few, whole_many = peaks(_IMPORTS, _WORK, told)
    more = (_MANY - _FEW) * _LAYER
    assert (many - few) / more < 0.3
    assert (whole_many - whole_few) / more > 0.9  # or the first would say nothing
