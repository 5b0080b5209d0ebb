"""What prompts begin with alike: computed once, with the same bits as computed each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.session import Session
from vera_edge.errors import DataError

CHUNK = 8
SHARED = np.random.default_rng(0).integers(3, 300, 30)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", CHUNK)


@pytest.fixture
def session(tiny_bundles: TinyBundles) -> Session:
    return Session.open(tiny_bundles.int4, threads=1, prompt_cache=1 << 20)


def ended(*words: int) -> np.ndarray:
    return np.append(SHARED, np.array(words, np.int64))


def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of Steps.feed gets from now on."""
    found: list[int] = []
    real = Steps.feed

    def feed(self: Steps, tokens: np.ndarray, last: bool = False) -> Any:
        found.append(tokens.shape[1])
        return real(self, tokens, last)

    monkeypatch.setattr(Steps, "feed", feed)
    return found


def test_a_shared_beginning_is_computed_once(
    session: Session, tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Session.open(tiny_bundles.int4, threads=1)
    expected = [plain.generate(ended(*end), max_tokens=12) for end in ((5, 6), (7, 8, 9))]
    texts = ["".join(one) for one in expected]
    first, second = (session.generate(ended(*end), max_tokens=12) for end in ((5, 6), (7, 8, 9)))
    assert "".join(first) == texts[0]
    calls = fed(monkeypatch)
    assert "".join(second) == texts[1]
    assert (first.tokens, second.tokens) == (expected[0].tokens, expected[1].tokens)
    assert (first.reused, second.reused) == (0, 24)
    assert calls[:2] == [8, 1], "the 33 tokens less 24, in chunks, then the answer"
    assert second.summary()["reused_tokens"] == 24


def test_a_prompt_that_is_known_whole_still_gives_its_logits(session: Session) -> None:
    prompt = SHARED[: 2 * CHUNK]
    one, two = (session.generate(prompt, max_tokens=5) for _ in range(2))
    assert "".join(one) == "".join(two)
    assert two.reused == CHUNK


def test_logits_and_caches_are_the_same_bits(session: Session) -> None:
    decoder, cache = session.decoder, PromptCache(1 << 20)
    whole = Steps(decoder, decoder.cache(40), {})
    logits = whole.prefill(ended(9, 4)).copy()
    for expected in (0, 24):
        steps = Steps(decoder, decoder.cache(40), {})
        reused, found = cache.prefill(steps, ended(9, 4))
        assert reused == expected
        np.testing.assert_array_equal(found, logits)
        assert all(map(np.array_equal, steps.cache, whole.cache))


def test_each_adapter_has_its_own(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.rows, "first", threads=1, prompt_cache=1 << 20)
    plain = Session.open(tiny_bundles.rows, "first", threads=1)
    for adapter, reused in (("first", 0), ("second", 0), (None, 0), ("first", 24)):
        for one in (session, plain):
            one.swap(adapter)
        kept, new = session.generate(ended(3), max_tokens=8), plain.generate(ended(3), max_tokens=8)
        assert ("".join(kept), kept.tokens) == ("".join(new), new.tokens)
        assert kept.reused == reused, adapter


def test_rows_of_a_batch_share_it(session: Session, tiny_bundles: TinyBundles, monkeypatch: Any) -> None:
    plain = Session.open(tiny_bundles.int4, threads=1)
    prompts = [ended(5), ended(6), ended(7)]
    expected = list(plain.generate_batch(prompts, max_tokens=6))
    calls = fed(monkeypatch)
    assert list(session.generate_batch(prompts, max_tokens=6)) == expected
    assert sum(count for count in calls if count > 1) == 31 + 2 * 7


def test_the_bound_is_kept_and_what_was_asked_for_lately_stays(session: Session) -> None:
    decoder = session.decoder
    chunk = sum(cache[0, :, :CHUNK].nbytes for cache in decoder.cache(CHUNK))
    cache = PromptCache(3 * chunk + chunk // 2)
    prompts = [np.full(2 * CHUNK + 1, word) for word in (5, 6)]

    def reused(prompt: np.ndarray) -> int:
        found = cache.prefill(Steps(decoder, decoder.cache(40), {}), prompt)[0]
        assert cache.size <= cache.limit
        return found

    assert [reused(prompts[0]), reused(prompts[1])] == [0, 0]
    assert reused(prompts[1]) == 2 * CHUNK
    assert reused(prompts[0]) == CHUNK, "its first chunk stayed, since the second is of no use without"
    small = PromptCache(chunk - 1)
    small.prefill(Steps(decoder, decoder.cache(40), {}), prompts[0])
    assert small.size == 0


def test_a_limit_below_nothing() -> None:
    with pytest.raises(DataError, match="prompt_cache"):
        Session.open(Path("nowhere"), prompt_cache=-1)
