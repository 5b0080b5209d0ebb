"""Which settings a graph is opened with, by what the installed ONNX Runtime knows."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

import vera_edge
from tests import tiny
from vera_edge.device.runtime.graph import GraphSettings, session_entries
from vera_edge.exporting import target

_AT_ONCE = "session.prepack.enable_parallel"


@pytest.mark.parametrize("version", ["1.31.0", "1.32.0", "2.0.0", "1.31.0.dev20260901"])
def test_all_threads_pack_where_the_runtime_knows_how(version: str) -> None:
    entries, notes = session_entries(GraphSettings(threads=2, pack_at_once=True), version)
    assert entries[_AT_ONCE] == "1" and not notes
    entries, notes = session_entries(GraphSettings(threads=2), version)
    assert _AT_ONCE not in entries and not notes


@pytest.mark.parametrize("version", ["1.22.0", "1.30.1"])
def test_a_setting_that_the_runtime_does_not_know_is_left_out_with_a_note(version: str) -> None:
    entries, notes = session_entries(GraphSettings(threads=2, pack_at_once=True), version)
    assert _AT_ONCE not in entries
    assert notes == (
        f"onnxruntime {version} packs weights with one thread; from 1.31 on all take part, and opening takes "
        "less time",
    )
    assert not session_entries(GraphSettings(threads=1, pack_at_once=True), version)[1]


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
