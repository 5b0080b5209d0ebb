"""Continuations: the same greedy text as transformers, cut where two models part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tests import tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.measuring.continuations import NEW_TOKENS, PROMPT_TOKENS, continue_both, pieces
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.text import windows
from vera_edge.text.windows import SourceText, Windows

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Plain:
    """A Runner that offers logits alone, and from `changes` on says another token."""

    inner: TorchReference
    changes: int = 10_000

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def logits(self, tokens: Int64) -> npt.NDArray[np.float32]:
        found = self.inner.logits(tokens)
        if len(tokens) >= self.changes:
            found[-1, found[-1].argmax()] = -100.0
        return found


def _windows(tiny_llama: tiny.TinyLlama) -> Windows:
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    text = SourceText("test", tiny.TEXT * 12, "")
    return windows.make(text, tokenizer, tiny.VOCABULARY, tokens=4 * 64, window=64)


def test_both_ways_of_continuing_give_what_transformers_gives(tiny_llama: tiny.TinyLlama) -> None:
    reference = open_reference(Checkpoint.open(tiny_llama.fp32))
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    cut = _windows(tiny_llama)
    found = continue_both(reference, _Plain(reference), cut, tokenizer, count=2)
    assert len(found) == 2
    model = tiny.load(tiny_llama.fp32)
    for sample, start in zip(found, (0, len(cut.tokens) // 2), strict=True):
        prompt = torch.from_numpy(cut.tokens[start][:PROMPT_TOKENS])[None]
        mask = torch.ones_like(prompt)
        made = model.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        expected = tokenizer.decode(made[0, PROMPT_TOKENS:].tolist(), skip_special_tokens=False)
        assert "".join(sample.reference) == expected
        assert sample.same == len(sample.reference)
        assert sample.candidate[: sample.same] == sample.reference


def test_they_are_cut_where_they_part(tiny_llama: tiny.TinyLlama) -> None:
    reference = open_reference(Checkpoint.open(tiny_llama.fp32))
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    parted = _Plain(reference, changes=PROMPT_TOKENS + 5)
    sample = continue_both(_Plain(reference), parted, _windows(tiny_llama), tokenizer, count=1)[0]
    assert sample.same == 5 and sample.reference[5] != sample.candidate[5]
    assert sample.reference[:5] == sample.candidate[:5]


def test_pieces_make_the_whole_text_again_even_over_split_characters(tiny_llama: tiny.TinyLlama) -> None:
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    ids = tokenizer.encode("é — 😀 ok", add_special_tokens=False).ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == "é — 😀 ok"
    assert "" in found  # the first bytes of a character say nothing yet


def test_no_samples_cost_nothing(tiny_llama: tiny.TinyLlama) -> None:
    reference = open_reference(Checkpoint.open(tiny_llama.fp32))
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    assert continue_both(reference, reference, _windows(tiny_llama), tokenizer, count=0) == ()
