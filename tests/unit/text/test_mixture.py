"""Texts to calibrate on: how shares are read, and that each text gives its part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests import tiny
from vera_edge.errors import DataError, PlanError
from vera_edge.text import mixture, windows
from vera_edge.text.mixture import Mixture


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tiny.save_tokenizer(tmp_path)
    return windows.open_tokenizer(tmp_path)


def _shares(*words: str) -> dict[str, float]:
    return {text.source: round(text.share, 6) for text in Mixture.of(words).texts}


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (("built-in",), {"built-in": 1}),
        (("a",), {"a": 0.5, "built-in": 0.5}),
        (("a=1",), {"a": 1}),
        (("a", "b"), {"a": 0.25, "b": 0.25, "built-in": 0.5}),
        (("a=0.2",), {"a": 0.2, "built-in": 0.8}),
        (("a=0.2", "b"), {"a": 0.2, "b": 0.4, "built-in": 0.4}),
        (("a", "built-in=0.2"), {"a": 0.8, "built-in": 0.2}),
        (("a", "built-in=0"), {"a": 1}),
        (("x=y.txt=0.4",), {"x=y.txt": 0.4, "built-in": 0.6}),
        (("x=y",), {"x=y": 0.5, "built-in": 0.5}),
    ],
)
def test_shares_come_to_one(words: tuple[str, ...], shares: dict[str, float]) -> None:
    assert _shares(*words) == shares


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a=0.7", "b=0.7"), "come to 1.4"),
        (("a=0.5", "built-in=0.2"), "come to 0.7, built-in text's among them"),
        (("a", "a=0.1"), "a is given to calibrate on more than once"),
        (("a=1.5",), "no share that can be"),
        (("a=nan",), "no share that can be"),
    ],
)
def test_shares_that_make_no_sense_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Mixture.of(words)


def test_a_file_whose_name_looks_like_a_share_is_taken_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "notes=0.5"
    path.write_text("words")
    assert Mixture.of(str(path)).texts[0].source == str(path)


def test_each_text_gives_its_share_of_the_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.TEXT * 200)
    texts = Mixture.of(f"{tmp_path / 'a.txt'}=0.25")
    cut = mixture.cut(texts, tokenizer, tiny.VOCABULARY, 64 * 64, 64)
    own, built_in = cut.used
    assert (own.tokens, built_in.tokens) == (16 * 64, 48 * 64)
    assert [entry["share"] for entry in cut.to_list()] == [0.25, 0.75]
    assert cut.to_list()[0]["text"] == "a.txt"
    assert cut.said() == f"1024 tokens of {tmp_path / 'a.txt'} and 3072 of built-in text"
    again = mixture.cut(texts, tokenizer, tiny.VOCABULARY, 64 * 64, 64)
    for one, other in zip(cut.windows, again.windows, strict=True):
        np.testing.assert_array_equal(one, other)


def test_built_in_text_makes_up_for_one_that_is_short(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.TEXT[:400])
    cut = mixture.cut(Mixture.of(str(tmp_path / "a.txt")), tokenizer, tiny.VOCABULARY, 64 * 64, 64)
    own, built_in = cut.used
    whole = len(tokenizer.encode(tiny.TEXT[:400], add_special_tokens=False).ids)
    assert whole - windows.MIN_WINDOW < own.tokens <= whole < 64 * 32
    assert own.tokens + built_in.tokens > 62 * 64


def test_a_text_alone_is_cut_as_it_is_for_measuring(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.TEXT * 20)
    text = str(tmp_path / "a.txt")
    alone = mixture.cut(Mixture.only(text), tokenizer, tiny.VOCABULARY, 512, 64)
    made = windows.make(windows.read_text(text), tokenizer, tiny.VOCABULARY, 512, 64)
    np.testing.assert_array_equal(np.stack(alone.windows), np.stack(made.tokens))


def test_built_in_text_gives_of_every_kind(tokenizer: Tokenizer) -> None:
    cut = mixture.cut(Mixture.of("built-in"), tokenizer, tiny.VOCABULARY, 400 * 64, 64)
    content = mixture._built_in()
    total = sum(map(len, content.values()))
    begun = 0
    for kind, text in content.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        known = {tuple(ids[at : at + 64]) for at in range(0, len(ids), 64)}
        here = sum(tuple(window.tolist()) in known for window in cut.windows)
        assert abs(here / len(cut.windows) - len(text) / total) < 0.05, kind
        begun += here
    assert begun >= len(cut.windows)


def test_built_in_text_holds_enough_of_every_kind_and_is_not_what_is_measured_on() -> None:
    """128,000 tokens of a tokenizer whose tokens are five bytes long, which none are on average."""
    kinds = mixture._built_in()
    assert sum(len(text.encode()) for text in kinds.values()) > 5 * 128_000
    for word in ("def ", "func ", "SELECT ", "static ", "impl<"):
        assert word in kinds["code"]
    for letters in "äéñжの中한ع":
        assert letters in kinds["languages"]
    measured = windows.read_text("built-in").content
    paragraphs = {part for part in measured.split("\n\n") if len(part) > 80}
    ours = mixture.read("built-in").content
    assert not [part for part in paragraphs if part in ours]


def test_windows_of_nothing_but_unknown_tokens_are_left_out(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("the of " * 200 + "else " * 400)
    cut = mixture.cut(Mixture.of(f"{tmp_path / 'a.txt'}"), words, 3, 64 * 100, 64)
    assert cut.windows and all(np.mean(window == 0) <= 0.25 for window in cut.windows)


def test_text_that_gives_nothing_is_refused_in_one_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("a")
    texts = Mixture.of([f"{tmp_path / name}=0.5" for name in "ab"])
    with pytest.raises(DataError, match="hold no 16 tokens to calibrate on; give a longer text"):
        mixture.cut(texts, tokenizer, tiny.VOCABULARY, 512, 64)
    with pytest.raises(DataError, match="a holds no 16 tokens to calibrate on; give a longer text"):
        mixture.cut(Mixture.of(str(tmp_path / "a")), tokenizer, tiny.VOCABULARY, 512, 64)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 200)), min_size=1, max_size=6), st.integers(0, 500))
def test_portions_are_whole_and_give_all_there_is(parts: list[tuple[float, int]], count: int) -> None:
    shares, available = [share for share, _ in parts], [most for _, most in parts]
    found = mixture._portions(shares, available, count)
    assert sum(found) == min(count, sum(available))
    assert all(0 <= portion <= most for portion, most in zip(found, available, strict=True))
