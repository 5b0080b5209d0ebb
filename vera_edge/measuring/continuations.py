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
    from vera_edge.exporting.exporter import Runner

PROMPT_TOKENS = 32
NEW_TOKENS = 32
# Where each token costs a pass over weights on disk.
NEW_TOKENS_BY_LAYER = 8


@runtime_checkable
class _Greedy(Protocol):
    """A Runner that continues a text with its own cache."""

    def greedy(self, tokens: npt.NDArray[np.int64], count: int, ends: Sequence[int]) -> list[int]: ...


@runtime_checkable
class _GreedyTogether(Protocol):
    """A Runner that continues several texts in the time of one."""

    def greedy_of(
        self, prompts: Sequence[npt.NDArray[np.int64]], count: int, ends: Sequence[int]
    ) -> list[list[int]]: ...


def runs_by_layer(runner: object) -> bool:
    """Whether a Runner reads its weights at every pass, so that passes are dear."""
    return bool(getattr(runner, "layer_by_layer", False))


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
    Where one is run layer by layer, for fewer tokens.
    """
    step = max(1, len(windows.tokens) // max(count, 1))
    prompts = [window[:PROMPT_TOKENS] for window in windows.tokens[::step]][:count]
    slow = runs_by_layer(reference) or runs_by_layer(candidate)
    tokens = NEW_TOKENS_BY_LAYER if slow else NEW_TOKENS
    progress("generating samples", 0, 2)
    both = [_continued(reference, prompts, tokens)]
    progress("generating samples", 1, 2)
    both.append(_continued(candidate, prompts, tokens))
    progress("generating samples", 2, 2)
    found = []
    for prompt, ours, theirs in zip(prompts, *both, strict=True):
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


def _continued(runner: Runner, prompts: Sequence[npt.NDArray[np.int64]], count: int) -> list[list[int]]:
    if isinstance(runner, _GreedyTogether):
        return runner.greedy_of(prompts, count, ())
    return [_greedy(runner, prompt, count) for prompt in prompts]


def _greedy(runner: Runner, prompt: npt.NDArray[np.int64], count: int) -> list[int]:
    if isinstance(runner, _Greedy):
        return runner.greedy(prompt, count, ())
    tokens = prompt
    for _ in range(count):
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
