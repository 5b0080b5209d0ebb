"""A resident adapter: the same bits as fed to each run, whoever runs beside it and whatever moves in."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

import vera_edge
from tests import tiny, tiny_bundle
from tests.conftest import Cli
from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime import resident, session, token_graph
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, MismatchError, PlanError
from vera_edge.serving.models import Models

# Written by our own exporter: int8 products, and vectors that the graph cuts up by itself.
BRANCH = Path(__file__).parents[3] / "golden" / "bundles" / "branch"
TOKENS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, 40)
PROMPT = "The adapter scales each row"


def logits(opened: Session) -> np.ndarray:
    return np.array(opened.logits(TOKENS % opened.vocab_size))


def test_logits_are_those_of_the_plain_graph_bit_for_bit() -> None:
    plain, opened = Session.open(BRANCH, threads=1), Session.open(BRANCH, threads=1, resident=True)
    assert opened.resident and not plain.resident
    assert opened.graph.vectors == plain.graph.vectors and opened.graph.inputs == plain.graph.inputs
    assert len(opened.graph.options) == len(plain.graph.options)
    truth = {}
    for choice in ("default", None):
        plain.swap(choice)
        truth[choice] = logits(plain)
    assert not np.array_equal(truth["default"], truth[None])
    np.testing.assert_array_equal(logits(opened), truth["default"])
    for choice, stays in ((None, False), ("default", False), (None, True), ("default", True), (None, True)):
        opened.swap(choice, resident=stays)
        np.testing.assert_array_equal(logits(opened), truth[choice], str((choice, stays)))


def test_an_open_session_takes_one_in(tiny_bundles: TinyBundles) -> None:
    opened = Session.open(tiny_bundles.branch)
    before = opened.generate(PROMPT, raw=True, max_tokens=20)
    pieces, truth = [next(before)], {}
    for choice in ("first", "second", None):
        opened.swap(choice)
        truth[choice] = logits(opened), "".join(opened.generate(PROMPT, raw=True, max_tokens=20))
    for choice in ("second", None, "first"):
        opened.swap(choice, resident=True)
        assert opened.adapter == choice and opened.resident
        np.testing.assert_array_equal(logits(opened), truth[choice][0])
    opened.swap("second", resident=True)
    assert "".join([*pieces, *before]) == truth["first"][1]  # as it began


def test_a_text_keeps_its_adapter_when_another_moves_in(tiny_bundles: TinyBundles) -> None:
    opened = Session.open(tiny_bundles.branch, resident=True)
    alone = {}
    for choice in ("first", "second", None):
        opened.swap(choice)
        alone[choice] = "".join(opened.generate(PROMPT, raw=True, max_tokens=20))
    assert len(set(alone.values())) == 3
    texts: dict[str | None, str] = {}
    opened.swap("first", resident=True)
    first = opened.generate(PROMPT, raw=True, max_tokens=20)
    texts["first"] = next(first)
    opened.swap("second", resident=True)
    second = opened.generate(PROMPT, raw=True, max_tokens=20)
    texts["second"] = next(second)
    texts["first"] += next(first)
    opened.swap(None, resident=True)
    texts[None] = "".join(opened.generate(PROMPT, raw=True, max_tokens=20))
    texts["first"] += "".join(first)
    texts["second"] += "".join(second)
    assert texts == alone


def test_adapters_move_in_while_threads_generate(tiny_bundles: TinyBundles) -> None:
    opened = Session.open(tiny_bundles.branch, threads=1, resident=True)
    alone = "".join(opened.generate(PROMPT, raw=True, max_tokens=60))
    running = [opened.generate(PROMPT, raw=True, max_tokens=60) for _ in range(3)]
    texts = ["", "", ""]

    def work(index: int) -> None:
        texts[index] = "".join(running[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for choice in ("second", None):
            opened.swap(choice, resident=True)
    for thread in threads:
        thread.join()
    assert texts == [alone] * 3


def test_rows_of_a_batch_differ_beside_it(tiny_bundles: TinyBundles) -> None:
    plain, opened = Session.open(tiny_bundles.rows), Session.open(tiny_bundles.rows, resident=True)
    for adapters in (["first", "second", None], None):
        found = []
        for one in (plain, opened):
            rows = ["", "", ""]
            for row, piece in one.generate_batch([PROMPT] * 3, adapters, max_tokens=8, raw=True):
                rows[row] += piece
            found.append(rows)
        assert found[0] == found[1] and len(set(found[0])) == (3 if adapters else 1)


def test_looking_ahead_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_graph, "_MOST_CUT", 1.0)  # a tiny branch is a large part of a tiny model
    opened, prompt = Session.open(BRANCH, threads=1, resident=True), np.array([5, 6, 7, 8] * 5, np.int64)
    plain, ahead = (opened.generate(prompt, max_tokens=20, speculate=n) for n in (0, 3))
    assert list(ahead) == list(plain) and ahead.tokens == plain.tokens


def test_a_server_and_a_chat_keep_it(tiny_bundles: TinyBundles) -> None:
    opened = Session.open(tiny_bundles.branch, resident=True)
    models = Models(opened, "served")
    assert models.vectors(models.get("served")) is models.vectors(models.get("first")) is opened.vectors
    assert models.vectors(models.get("second")) is not opened.vectors
    talk = vera_edge.chat(tiny_bundles.branch, resident=True)
    list(talk.take("/adapter second"))
    assert talk.session.adapter == "second"
    assert isinstance(talk.session.graph, resident.ResidentGraph)
    with talk.session.graph.reading(talk.session.vectors) as here:
        assert here


def test_what_cannot_be_resident_is_said(
    tiny_bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MismatchError, match="has its adapter merged"):
        Session.open(tiny_bundles.fp32, resident=True)
    merged = Session.open(tiny_bundles.fp32)
    with pytest.raises(MismatchError, match="has its adapter merged"):
        merged.swap("default", resident=True)
    opened = Session.open(tiny_bundles.branch)
    with pytest.raises(MismatchError, match="no adapter named 'third'"):
        opened.swap("third", resident=True)
    assert not opened.resident  # nothing was opened for it
    monkeypatch.setattr(session, "free_memory", lambda: 1000)
    with pytest.raises(PlanError, match=r"MB beside the open one, .* resident=True"):
        opened.swap("second", resident=True)
    assert (opened.adapter, opened.resident) == ("first", False)
    shutil.copytree(tiny_bundles.branch, tmp_path / "encoder")
    tiny_bundle.rewrite(tmp_path / "encoder", kind="encoder")
    with pytest.raises(PlanError, match="is an encoder"):
        vera_edge.open_bundle(tmp_path / "encoder", resident=True)


def test_a_runtime_that_copies_what_is_handed_over_is_refused(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resident.reads_in_place()
    monkeypatch.setattr(resident, "reads_in_place", lambda: False)
    with pytest.raises(PlanError, match="copies what is written for a resident adapter"):
        Session.open(tiny_bundles.branch, resident=True)


def test_a_graph_that_is_none_is_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundles.branch / "onnx", tmp_path / "onnx")
    path = tmp_path / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match="isn't an ONNX graph"):
        resident.ResidentGraph(path)


def test_run_gives_the_same_text(tiny_bundles: TinyBundles, cli: Cli) -> None:
    words = ("run", tiny_bundles.branch, PROMPT, "--raw", "--max-tokens", 8, "--adapter", "second")
    plain, done = cli(*words), cli(*words, "--resident")
    assert done.exit_code == 0 and done.stdout == plain.stdout and done.stdout.strip()
    refused = cli("run", tiny_bundles.fp32, PROMPT, "--resident")
    assert refused.exit_code == 2 and "has its adapter merged" in " ".join(refused.output.split())
