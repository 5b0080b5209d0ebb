"""Greedy continuations of the same prompts by both models, to be read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from vera_edge.measuring.result import Generations
from vera_edge.progress import Progress, silent
from vera_edge.text.windows import Windows

if TYPE_CHECKING:
    from vera_edge.exporting.target import Runner

PROMPT_TOKENS = 32
NEW_TOKENS = 32


@runtime_checkable
class _Greedy(Protocol):
    """A Runner that continues a text with its own cache."""

    def greedy(self, tokens: npt.NDArray[np.int64], count: int, ends: Sequence[int]) -> list[int]: ...


def continue_both(
    reference: Runner,
    candidate: Runner,
    windows: Windows,
    tokenizer: Tokenizer,
    count: int,
    progress: Progress = silent,
) -> tuple[Generations, ...]:
    """`count` prompts, the starts of windows spread over the text, each continued by both models.

    A model that has no quicker way runs the whole sequence again for every token: enough for a few lines.
    """
    step = max(1, len(windows.tokens) // max(count, 1))
    prompts = [window[:PROMPT_TOKENS] for window in windows.tokens[::step]][:count]
    found = []
    for index, prompt in enumerate(prompts):
        progress("generating samples", index, len(prompts))
        ours, theirs = _greedy(reference, prompt), _greedy(candidate, prompt)
        shared = min(len(ours), len(theirs))
        same = next((place for place in range(shared) if ours[place] != theirs[place]), shared)
        found.append(
            Generations(
                tokenizer.decode(prompt.tolist(), skip_special_tokens=False),
                pieces(tokenizer, ours),
                pieces(tokenizer, theirs),
                same,
            )
        )
    return tuple(found)


def _greedy(runner: Runner, prompt: npt.NDArray[np.int64]) -> list[int]:
    if isinstance(runner, _Greedy):
        return runner.greedy(prompt, NEW_TOKENS, ())
    tokens = prompt
    for _ in range(NEW_TOKENS):
        best = int(runner.logits(tokens)[-1].argmax())
        tokens = np.append(tokens, np.int64(best))
    return [int(token) for token in tokens[len(prompt) :]]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, ...]:
    """One text per token, which joined are the whole text: a character split over tokens goes to the last."""
    found, text = [], ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if end < len(ids) and now.endswith("\N{REPLACEMENT CHARACTER}"):
            found.append("")
            continue
        found.append(now[len(text) :])
        text = now
    return tuple(found)
