"""The engine alone: rows that are cancelled, what fails, what doesn't fit."""

from __future__ import annotations

import queue
import time
from typing import Any

import numpy as np
import pytest

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime.decoding import RopeSwitch, Steps
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.sampling import Sampling
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, PlanError, VeraEdgeError
from vera_edge.serving.engine import BatchEngine
from vera_edge.serving.job import Job
from vera_edge.serving.settings import Settings

PROMPT = "The adapter scales each row"


class Asked:
    """A job, and the pieces that came of it."""

    def __init__(self, session: Session, limit: int, model: str | None = "first") -> None:
        self.pieces: queue.Queue[Any] = queue.Queue()
        tokens = session.tokens(PROMPT, True, {})
        vectors = session.vectors_of(model)
        self.job = Job(
            session.decoder, session.text, tokens, vectors, Sampling(), limit, (), None, self.pieces.put
        )

    def text(self) -> str:
        """All of it; raises what the engine delivered as an error."""
        text = ""
        while True:
            piece = self.pieces.get(timeout=60)
            if isinstance(piece, VeraEdgeError):
                raise piece
            text += piece.text
            if piece.finish is not None:
                return text


@pytest.fixture
def session(tiny_bundles: TinyBundles) -> Session:
    return Session.open(tiny_bundles.rows, threads=1)


def wait_until_idle(engine: BatchEngine) -> None:
    until = time.monotonic() + 60
    while engine.running:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_rows_of_those_who_left_are_given_to_others(session: Session) -> None:
    engine = BatchEngine(session.decoder, Settings(rows=2, queue=50))
    asked = [Asked(session, 200) for _ in range(20)]
    last = Asked(session, 12, "second")
    for each in [*asked, last]:
        engine.submit(each.job)
    engine.start()
    for each in asked:
        each.job.cancelled = True
    session.swap("second")
    assert last.text() == "".join(session.generate(PROMPT, raw=True, max_tokens=12))
    wait_until_idle(engine)
    assert not engine._lanes and not engine._prompts  # and with them the caches
    engine.stop()


def test_what_prompts_begin_with_is_computed_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 3)
    chunks: list[int] = []
    real = Steps.feed

    def feed(self: Steps, tokens: Any, last: bool = False) -> Any:
        chunks.append(tokens.shape[1])
        return real(self, tokens, last)

    monkeypatch.setattr(Steps, "feed", feed)
    texts, fed = [], []
    for earlier in (PromptCache(1 << 20), PromptCache(0)):
        engine = BatchEngine(session.decoder, Settings(rows=2), earlier)
        engine.start()
        for model in ("first", "first", "second", "first"):
            chunks.clear()
            asked = Asked(session, 6, model)
            engine.submit(asked.job)
            texts.append(asked.text())
            fed.append(sum(chunks) - 5)  # five steps after the prompt, of as many rows
        engine.stop()
    prompt = len(session.tokens(PROMPT, True, {}))
    last = prompt - 3 * ((prompt - 1) // 3)
    assert texts[:4] == texts[4:]
    assert last < prompt
    assert fed == [prompt, last, prompt, last, *[prompt] * 4]


def test_what_fails_ends_its_request_and_never_the_engine(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = BatchEngine(session.decoder, Settings(rows=2))
    engine.start()
    for error, says in (
        (BundleError("ONNX Runtime fails"), "ONNX Runtime fails"),
        (MemoryError(), "memory ran out"),
        (ValueError("a bug"), "its log says how"),
    ):
        asked = Asked(session, 12)
        with monkeypatch.context() as patched:

            def feed(self: Steps, tokens: Any, last: bool = False, error: Exception = error) -> Any:
                raise error

            patched.setattr(Steps, "feed", feed)
            engine.submit(asked.job)
            with pytest.raises(BundleError, match=says):
                asked.text()
        wait_until_idle(engine)
        again = Asked(session, 4)
        engine.submit(again.job)
        assert again.text()
    engine.stop()
    assert "a bug" in capsys.readouterr().err


def test_a_text_whose_rotary_embedding_would_change_runs_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    # None of the tiny graphs has such an embedding, so the graph's side of it is left out.
    decoder = dataclasses.replace(session.decoder, rope=RopeSwitch(40, recompute=True))
    monkeypatch.setattr(Steps, "_set", _without_rope(Steps._set))
    engine = BatchEngine(decoder, Settings(rows=4))
    engine.start()
    asked = [Asked(session, limit, model) for limit in (8, 100) for model in ("first", None)]
    for each in asked:
        engine.submit(each.job)
    texts = [each.text() for each in asked]
    engine.stop()
    for text, (limit, model) in zip(
        texts, [(limit, model) for limit in (8, 100) for model in ("first", None)], strict=True
    ):
        session.swap(model)
        assert text == "".join(session.generate(PROMPT, raw=True, max_tokens=limit))


def _without_rope(put: Any) -> Any:
    def _set(self: Steps, name: str, values: np.ndarray) -> None:
        if name != "rope_sequence_length":
            put(self, name, values)

    return _set


def test_caches_that_do_not_fit_are_refused_at_once(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_edge.serving.engine.free_memory", lambda: 1_000_000)
    with pytest.raises(PlanError, match="8 rows of 256 tokens may take"):
        BatchEngine(session.decoder, Settings(rows=8))
    BatchEngine(session.decoder, Settings(rows=1, context=64))
