"""Looking ahead: the same tokens and the same bits as one token a step, whatever was proposed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime import lookahead, token_graph
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.lookahead import Lookahead, SpeculativeSteps
from vera_edge.device.runtime.ngrams import EarlierTokens
from vera_edge.device.runtime.row_products import BlockProduct, alike
from vera_edge.device.runtime.session import Session
from vera_edge.errors import DataError, PlanError

# Written by our own exporter: int8 products, and a branch with a projection in one block.
BRANCH = Path(__file__).parents[3] / "golden" / "bundles" / "branch"
PROMPT = np.array([5, 6, 7, 8] * 5, np.int64)


@pytest.fixture(scope="module")
def merged(tiny_bundles: TinyBundles) -> Session:
    return Session.open(tiny_bundles.int4, threads=1)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks ahead whenever it can, gain or not."""
    monkeypatch.setattr(lookahead, "_cost", lambda *_: 0.0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_the_text_is_the_same_token_by_token(merged: Session, temperature: float) -> None:
    plain = merged.generate(PROMPT, max_tokens=60, temperature=temperature, seed=3)
    ahead = merged.generate(PROMPT, max_tokens=60, temperature=temperature, seed=3, speculate=3)
    assert list(ahead) == list(plain)
    assert (ahead.tokens, ahead.finish) == (plain.tokens, plain.finish)
    assert ahead.summary()["speculation"]["fed"] > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_few_tokens_are_exactly_as_many(merged: Session, tokens: int) -> None:
    plain, ahead = (merged.generate(PROMPT, max_tokens=tokens, speculate=n) for n in (0, 4))
    assert "".join(ahead) == "".join(plain)
    assert (ahead.tokens, ahead.finish) == (plain.tokens, plain.finish)


@pytest.mark.usefixtures("eager")
def test_a_stop_string_ends_it_at_the_same_place(merged: Session) -> None:
    text = "".join(merged.generate(PROMPT, max_tokens=60))
    stop = text[len(text) // 2 :][:3]
    plain, ahead = (merged.generate(PROMPT, max_tokens=60, stop=stop, speculate=n) for n in (0, 4))
    assert "".join(ahead) == "".join(plain)
    assert ahead.finish == plain.finish == "stop"


@pytest.mark.usefixtures("eager")
def test_up_to_the_end_of_the_context(merged: Session) -> None:
    context = merged.decoder.context
    prompt = np.resize(PROMPT, context - 6)
    plain, ahead = (merged.generate(prompt, max_tokens=100, speculate=n) for n in (0, 4))
    assert "".join(ahead) == "".join(plain)
    assert len(ahead.tokens) == len(plain.tokens) <= 6


@pytest.mark.parametrize("adapter", ["default", None])
def test_a_branch_with_and_without_its_adapter(adapter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_graph, "_MOST_CUT", 1.0)  # a tiny branch is a large part of a tiny model
    session = Session.open(BRANCH, adapter, threads=1)
    plain, ahead = (session.generate(PROMPT, max_tokens=40, speculate=n) for n in (0, 3))
    assert "".join(ahead) == "".join(plain)
    assert ahead.tokens == plain.tokens


@pytest.mark.usefixtures("eager")
def test_wrong_proposals_leave_the_cache_as_the_text_has_it(
    merged: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals that are right for 0, 1, 2 and 3 tokens; logits and caches are compared bit for bit."""
    draw = np.random.default_rng(0)
    text = draw.integers(3, merged.vocab_size, 60)
    calls = iter(range(1000))

    def proposed(_: EarlierTokens, known: np.ndarray, count: int) -> list[int]:
        right = next(calls) % 4
        coming = np.resize(text[len(known) : len(known) + count], count)
        coming[right:] = (coming[right:] + 1) % merged.vocab_size
        return [int(token) for token in coming]

    monkeypatch.setattr(EarlierTokens, "next", proposed)
    ahead = Lookahead.open(merged.decoder, 3)
    plain, shared = (Steps(merged.decoder, merged.decoder.cache(80), {}) for _ in range(2))
    many = SpeculativeSteps(shared, ahead)
    for steps in (plain, shared):
        steps.prefill(text[:10])
    for length in range(11, 56):
        np.testing.assert_array_equal(many.append(text[:length]), plain.append(text[:length]))
    held = int(plain.lengths[0])
    for one, other in zip(plain.cache, shared.cache, strict=True):
        np.testing.assert_array_equal(one[:, :, :held], other[:, :, :held])
    assert many.kept == pytest.approx(1.5 / 2.5 * 45, abs=4)  # of every 2.5 tokens 1.5 were there already


def test_proposals_that_do_not_come_are_no_longer_fed_and_those_that_come_are(merged: Session) -> None:
    """A step costs as two. Random tokens after a run that repeats itself: few steps, then no proposal."""
    ahead = replace(Lookahead.open(merged.decoder, 3), cost=2.0)
    again = np.resize(np.arange(5, 12), 60)
    steps = Steps(merged.decoder, merged.decoder.cache(200), {})
    steps.prefill(again[:10])
    many = SpeculativeSteps(steps, ahead)
    for length in range(11, 61):
        many.append(again[:length])
    assert many.kept >= 36 and many.steps <= 14, "three of four tokens came with the one before them"
    text, fed = np.append(again, np.random.default_rng(0).integers(20, 24, 120)), []
    for length in range(61, 181):
        many.append(text[:length])
        fed.append(many.fed)
    assert fed[-1] - fed[59] <= 9, "pairs come again, and what followed them doesn't"


def test_logits_that_would_be_others_are_refused(merged: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    monkeypatch.setattr(lookahead, "_vectors", lambda _: {})
    real = Steps.feed

    def rounded(self: Steps, tokens: np.ndarray, last: bool = False) -> np.ndarray:
        logits = real(self, tokens, last)
        return logits if tokens.shape[1] == 1 else logits * (1 + 1e-6 * draw.random(logits.shape, np.float32))

    monkeypatch.setattr(Steps, "feed", rounded)
    with pytest.raises(PlanError, match="would change the text"):
        Lookahead.open(merged.decoder, 2)


def test_floats_gain_nothing_and_are_refused(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32, threads=1)
    with pytest.raises(PlanError, match="blocks of 32"):
        session.generate(PROMPT, speculate=2)
    assert len(session.generate(PROMPT, max_tokens=2).prompt) == len(PROMPT)  # as before


@pytest.mark.parametrize("number", [-1, 17])
def test_a_number_that_cannot_be(merged: Session, number: int) -> None:
    with pytest.raises(DataError, match="speculate"):
        merged.generate(PROMPT, speculate=number)


def test_too_little_memory_is_said_before(merged: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "free_memory", lambda: 1000)
    with pytest.raises(PlanError, match="second graph"):
        Lookahead.open(merged.decoder, 5)


def test_products_that_round_rows_otherwise_are_cut_where_they_are_few(merged: Session) -> None:
    model = merged.graph.path.read_bytes()
    with pytest.raises(PlanError, match="gains nothing"):
        token_graph.rewrite(model, 3, lambda _: False)
    assert token_graph.rewrite(model, 3, lambda _: True)[1] == 0


def test_weights_that_are_formed_of_others_are_weights_too(merged: Session) -> None:
    import onnx

    model = onnx.load(merged.graph.path, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in products:
        formed = onnx.helper.make_node("Identity", [node.input[1]], [f"{node.input[1]}/formed"])
        node.input[1] = formed.output[0]
        model.graph.node.insert(0, formed)
    with pytest.raises(PlanError, match="gains nothing"):
        token_graph.rewrite(model.SerializeToString(), 3, lambda _: False)


def test_a_probe_tells_kernels_apart_that_add_up_otherwise() -> None:
    assert not alike(BlockProduct(64, 32, 4, 4, False)) or alike(BlockProduct(64, 32, 8, 4, False))
    assert not alike(BlockProduct(64, 32, 3, 4, False)), "what ONNX Runtime refuses is never alike"


def test_what_followed_the_last_place_that_ended_so() -> None:
    earlier = EarlierTokens()
    text = np.array([1, 2, 3, 4, 9, 1, 2, 3], np.int64)
    assert earlier.next(text[:4], 2) == []
    assert earlier.next(text, 2) == [4, 9]
    assert earlier.next(np.append(text, [4, 7, 2, 3]), 3) == [4, 7, 2]  # the later place


def test_a_short_way_back_is_repeated() -> None:
    assert EarlierTokens().next(np.array([8, 5, 6, 5, 6, 5, 6]), 5) == [5, 6, 5, 6, 5]


def test_a_text_that_is_told_in_steps_is_known_as_a_whole_one() -> None:
    text = np.random.default_rng(4).integers(0, 5, 200)
    slowly = EarlierTokens()
    for length in range(1, 201):
        assert slowly.next(text[:length], 3) == EarlierTokens().next(text[:length], 3)
