"""Text into token windows: what is cut where, and which text is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests import tiny
from vera_edge.errors import CheckpointError, DataError, MismatchError
from vera_edge.text import windows
from vera_edge.text.bootstrap import MIN_WINDOWS
from vera_edge.text.windows import SourceText


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tiny.save_tokenizer(tmp_path)
    return windows.open_tokenizer(tmp_path)


def _text(content: str) -> SourceText:
    return SourceText("test", content, "")


def test_the_built_in_text_holds_english_and_code_in_useful_amounts(tokenizer: Tokenizer) -> None:
    text = windows.read_text("built-in")
    assert 30_000 < len(text.content) < 100_000
    assert "Swiss Confederation" in text.content and "def safe_join(" in text.content
    assert windows.read_text("built-in").sha256 == text.sha256


def test_windows_are_the_tokens_of_the_text_in_order(tokenizer: Tokenizer) -> None:
    text = _text(tiny.TEXT * 20)
    cut = windows.make(text, tokenizer, tiny.VOCABULARY, tokens=100_000, window=32)
    ids = tokenizer.encode(text.content, add_special_tokens=False).ids
    assert np.concatenate(cut.tokens).tolist() == ids[: len(ids) // 32 * 32]
    assert {len(window) for window in cut.tokens} == {32}
    assert cut.scored == len(cut.tokens) * 31


def test_fewer_windows_than_the_text_holds_are_spread_over_all_of_it(tokenizer: Tokenizer) -> None:
    text = _text(tiny.TEXT * 20)
    whole = windows.make(text, tokenizer, tiny.VOCABULARY, tokens=100_000, window=32).tokens
    some = windows.make(text, tokenizer, tiny.VOCABULARY, tokens=32 * 5, window=32).tokens
    starts = [next(i for i, w in enumerate(whole) if w is not None and (w == s).all()) for s in some]
    assert len(some) == 5 and len(whole) >= 20
    np.testing.assert_array_equal(some[1], whole[len(whole) // 5])
    np.testing.assert_array_equal(some[4], whole[4 * len(whole) // 5])
    assert starts == sorted(starts)


def test_a_tokenizer_that_starts_texts_with_a_token_starts_windows_with_it(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    cut = windows.make(_text(tiny.TEXT * 5), tokenizer, tiny.VOCABULARY, tokens=10_000, window=32)
    assert all(window[0] == 1 and len(window) == 32 for window in cut.tokens)
    assert not any(2 in window for window in cut.tokens)


def test_a_tokenizer_that_only_ends_texts_adds_nothing(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    cut = windows.make(_text(tiny.TEXT * 5), tokenizer, tiny.VOCABULARY, tokens=10_000, window=32)
    plain = tokenizer.encode(tiny.TEXT * 5, add_special_tokens=False).ids
    assert cut.tokens[0].tolist() == plain[:32]


def test_a_short_text_is_cut_into_enough_short_windows(tokenizer: Tokenizer) -> None:
    cut = windows.make(_text(tiny.TEXT * 3), tokenizer, tiny.VOCABULARY)
    assert len(cut.tokens) >= MIN_WINDOWS
    assert {len(window) for window in cut.tokens} == {cut.window}
    assert windows.MIN_WINDOW <= cut.window < windows.WINDOW


def test_a_tiny_text_has_fewer_windows_rather_than_shorter_ones(tokenizer: Tokenizer) -> None:
    cut = windows.make(_text(tiny.TEXT[:120]), tokenizer, tiny.VOCABULARY)
    assert 0 < len(cut.tokens) < MIN_WINDOWS and cut.window == windows.MIN_WINDOW


def test_truncation_saved_in_the_tokenizer_does_not_cut_the_text(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(16)
    saved.save(str(tmp_path / "tokenizer.json"))
    cut = windows.make(_text(tiny.TEXT * 10), windows.open_tokenizer(tmp_path), tiny.VOCABULARY, window=32)
    assert cut.scored > 100


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no text"):
        windows.read_text(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        windows.read_text(tmp_path / "none.txt")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        windows.read_text(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=r"isn't UTF-8 text \(byte 3\)"):
        windows.read_text(path)


def test_too_few_tokens_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="too few to measure on"):
        windows.make(_text("tiny"), tokenizer, tiny.VOCABULARY)


def test_a_window_that_is_too_small_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="too small"):
        windows.make(_text(tiny.TEXT), tokenizer, tiny.VOCABULARY, window=4)
    with pytest.raises(DataError, match="252 tokens don't fill a window of 256"):
        windows.make(_text(tiny.TEXT), tokenizer, tiny.VOCABULARY, 252, 256)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(MismatchError, match="knows 384 tokens and the model only 300"):
        windows.make(_text(tiny.TEXT * 9), tokenizer, 300)


def test_tokenizers_that_split_differently_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    tiny.save_tokenizer(one)
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(other / "tokenizer.json"))
    windows.check_tokenizers(_text(tiny.TEXT), [one, one, tmp_path])
    with pytest.raises(MismatchError, match="split the same text differently"):
        windows.check_tokenizers(_text(tiny.TEXT), [one, other])


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        windows.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="isn't a tokenizer"):
        windows.open_tokenizer(tmp_path)
