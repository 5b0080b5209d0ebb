"""Probabilities against torch, and the bytes of tokens against the text that they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.log_probabilities import TokenBytes, choice

TEXT = "A row’s end: naïve 🌊 ñandú,\n\ttab — 日本"


def test_they_are_those_of_torch() -> None:
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32) * 30
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0)
    found = choice(logits, 17, 5)
    assert found.logprob == pytest.approx(float(expected[17]), abs=1e-9)
    values, ids = expected.topk(5)
    assert [token for token, _ in found.top] == ids.tolist()
    np.testing.assert_allclose([value for _, value in found.top], values)


def test_ties_come_by_id_and_no_more_than_asked() -> None:
    found = choice(np.zeros(9, np.float32), 4, 3)
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert choice(np.zeros(9, np.float16), 4, 0).top == ()


def test_bytes_of_a_byte_level_tokenizer_make_up_the_text(tiny_bundles: TinyBundles) -> None:
    text = BundleText(tiny_bundles.fp32)
    tokens = text.tokens(TEXT, special=False)
    assert b"".join(map(TokenBytes(text).of, tokens.tolist())) == TEXT.encode()
    special, name = next(iter(text.special_tokens.items()))
    assert TokenBytes(text).of(special) == name.encode()
    assert TokenBytes(text).of(100_000) == b""


def test_bytes_of_a_tokenizer_with_byte_fallback_make_up_the_text(tmp_path: Path) -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "A", "r", "o", "w", "▁r"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "r")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = BundleText(tmp_path)
    tokens = text.tokens(TEXT, special=False)
    assert b"".join(map(TokenBytes(text).of, tokens.tolist())) == TEXT.encode()
