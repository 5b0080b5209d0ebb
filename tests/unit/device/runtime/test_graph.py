"""Which settings a graph is opened with, by what the installed ONNX Runtime knows."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

import vera_edge
from tests import tiny
from vera_edge.device.runtime.graph import GraphSettings, session_entries
from vera_edge.exporting import target

_AT_ONCE, _SPINS = "session.prepack.enable_parallel", "session.intra_op.allow_spinning"
_SPIN_FOR = "session.intra_op.spin_duration_us"
_BOTH = GraphSettings(threads=2, pack_at_once=True)


@pytest.mark.parametrize("version", ["1.31.0", "1.32.0", "2.0.0", "1.31.0.dev20260901"])
def test_what_the_runtime_knows_is_set(version: str) -> None:
    entries, notes = session_entries(_BOTH, version)
    assert entries[_AT_ONCE] == "1" and not notes
    assert entries[_SPINS] == "1" and 0 < int(entries[_SPIN_FOR]) <= 100
    entries, notes = session_entries(GraphSettings(threads=2), version)
    assert _AT_ONCE not in entries and not notes


def test_one_thread_waits_for_none() -> None:
    for version in ("1.22.0", "1.32.0"):
        entries, notes = session_entries(GraphSettings(threads=1, pack_at_once=True), version)
        assert entries[_SPINS] == "0" and not {_AT_ONCE, _SPIN_FOR} & entries.keys() and not notes


@pytest.mark.parametrize(
    ("version", "left_out"), [("1.22.0", 2), ("1.25.1", 2), ("1.27.0", 1), ("1.30.1", 1)]
)
def test_a_setting_that_the_runtime_does_not_know_is_left_out_with_a_note(
    version: str, left_out: int
) -> None:
    entries, notes = session_entries(_BOTH, version)
    assert _AT_ONCE not in entries and (_SPIN_FOR in entries) == (left_out == 1)
    assert len(notes) == left_out
    does, gain = "packs weights with one thread", "from 1.31 on opening takes less time with several"
    assert notes[-1] == f"onnxruntime {version} {does}; {gain}"


def test_who_opens_a_bundle_is_told(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.export(tiny_llama.fp32, [(tiny_adapter, 1.0)], tmp_path / "out", weights="int8")
    monkeypatch.setattr("vera_edge.device.runtime.opened._LARGE", 0)
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)

    opened = vera_edge.open_bundle(tmp_path / "out", threads=2, tell=tell)
    assert [note for note in told if "packs weights with one thread" in note] == list(opened.graph.notes)
    assert len(opened.graph.notes) == 1
