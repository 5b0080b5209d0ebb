"""Golden vectors: what the model as trained answers to a few prompts, carried in the bundle.

Made where the reference can run, read where it can't. Each case is a prompt and the reference's greedy
continuation; for every position it holds the reference's `k` most likely next tokens and their
log-probabilities. From these and a candidate's logits follows the KL divergence over k + 1 outcomes: the k
tokens, and "any other". By the data-processing inequality it is never above the full KL divergence, and it is
near it when the k tokens hold most of the probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Array, Float64, Tokens
from vera_edge.device.runtime.chat import BundleText
from vera_edge.divergence import kl_of_listed, log_softmax
from vera_edge.errors import BundleError, DataError
from vera_edge.progress import Progress, silent
from vera_edge.storage.json_text import TABLE, canonical_json, read_json

FILE = "golden.json"
FORMAT = 1
_ROWS = 8  # positions handled at once: float64 over a large vocabulary stays a few megabytes
_MAX_CASES, _MAX_LENGTH, _MAX_K = 256, 4096, 1024
PROMPTS = (
    "What is the capital of France?",
    "Write a short letter to a friend about the weather today.",
    "Explain why the sky is blue to a child of six.",
    "List three things to check before a long drive.",
    "A train leaves at 9:40 and arrives at 12:05. How long is the journey?",
    "Write a Python function that returns the largest number of a list.",
)


class GivesLogits(Protocol):
    """What gives the reference's logits: (n,) token ids to (n, vocab) float32."""

    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]: ...


@runtime_checkable
class Continues(Protocol):
    """A reference that continues a text faster than by all its logits again for every token."""

    def greedy(self, tokens: Tokens, count: int, ends: Sequence[int]) -> list[int]: ...


@runtime_checkable
class AnswersTogether(Protocol):
    """A reference that continues, and reads, several texts in fewer passes over its weights."""

    def greedy_of(self, prompts: Sequence[Tokens], count: int, ends: Sequence[int]) -> list[list[int]]: ...

    def logits_of(self, windows: Sequence[Tokens]) -> Iterator[npt.NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Case:
    """One prompt, its greedy continuation by the reference, and the reference's best guesses all along.

    adapter: a name of the bundle, or None for the base alone. tokens: (n,) prompt and continuation; the
    first `prompt` of them are the prompt. ids, log_p: (n, k), row i about token i + 1, most likely first.
    """

    adapter: str | None
    tokens: Tokens
    prompt: int
    ids: npt.NDArray[np.int64]
    log_p: Float64

    @property
    def continuation(self) -> list[int]:
        """The reference's greedy continuation."""
        return [int(token) for token in self.tokens[self.prompt :]]


@dataclass(frozen=True)
class Golden:
    """The cases of a bundle. `reference` says in a sentence what they were made with."""

    reference: str
    cases: tuple[Case, ...]


def make(
    references: Mapping[str | None, GivesLogits],
    text: BundleText,
    reference: str,
    prompts: Sequence[str] = PROMPTS,
    ends: frozenset[int] = frozenset(),
    new_tokens: int = 16,
    k: int = 32,
    progress: Progress = silent,
) -> Golden:
    """Ask each of `references` (by adapter name, None for the base) for its answers to `prompts`.

    text: the bundle's own, so that token ids are those of the device. ends: tokens after which the
    continuation stops. Six prompts of 40 tokens and 16 new ones at k = 32 are about 200 KB for each adapter.
    """
    cases: list[Case] = []
    total = len(references) * len(prompts)
    asked = [text.prompt(prompt, raw=not text.has_template) for prompt in prompts]
    for adapter, runner in references.items():
        progress("making golden vectors", len(cases), total)
        for prompt, tokens, logits in _answers(runner, asked, ends, new_tokens):
            cases.append(_case(adapter, prompt, tokens, logits, k))
            progress("making golden vectors", len(cases), total)
    return Golden(reference, tuple(cases))


def _answers(
    runner: GivesLogits, prompts: Sequence[Tokens], ends: frozenset[int], count: int
) -> Iterator[tuple[Tokens, Tokens, npt.NDArray[np.float32]]]:
    """Each prompt, it with its continuation, and the logits of that."""
    if isinstance(runner, AnswersTogether):
        continued = runner.greedy_of(prompts, count, sorted(ends))
        texts = [
            np.append(prompt, np.array(found, np.int64))
            for prompt, found in zip(prompts, continued, strict=True)
        ]
        yield from zip(prompts, texts, runner.logits_of(texts), strict=True)
        return
    for prompt in prompts:
        if isinstance(runner, Continues):
            tokens = np.append(prompt, np.array(runner.greedy(prompt, count, sorted(ends)), np.int64))
        else:
            tokens = _continued(runner, prompt, ends, count)
        yield prompt, tokens, runner.logits(tokens)


def _case(
    adapter: str | None, prompt: Tokens, tokens: Tokens, logits: npt.NDArray[np.float32], k: int
) -> Case:
    k = min(k, logits.shape[1])
    log_p = np.concatenate([log_softmax(logits[at : at + _ROWS]) for at in range(0, len(logits), _ROWS)])
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    return Case(adapter, tokens, len(prompt), ids, np.take_along_axis(log_p, ids, axis=1))


def _continued(runner: GivesLogits, tokens: Tokens, ends: frozenset[int], count: int) -> Tokens:
    for _ in range(count):
        chosen = int(runner.logits(tokens)[-1].argmax())
        tokens = np.append(tokens, chosen)
        if chosen in ends:
            break
    return tokens


def to_bytes(golden: Golden) -> bytes:
    """The content of golden.json."""
    cases = [
        {
            "adapter": case.adapter,
            "tokens": case.tokens.tolist(),
            "prompt": case.prompt,
            # One string for each position keeps a file of tens of thousands of numbers small and readable.
            "ids": [" ".join(map(str, row)) for row in case.ids.tolist()],
            "log_p": [" ".join(f"{value:.5f}" for value in row) for row in case.log_p.tolist()],
        }
        for case in golden.cases
    ]
    return canonical_json({"format": FORMAT, "reference": golden.reference, "cases": cases})


def read(path: Path, vocab_size: int) -> Golden:
    """Read golden vectors, checking every size and range. Raises BundleError when they are malformed."""
    value = read_json(path, BundleError, TABLE)
    if value.get("format") != FORMAT:
        raise BundleError(
            f"{path} has format {value.get('format')!r} and vera-edge reads {FORMAT}; update it"
        )
    try:
        entries = value["cases"]
        if not 0 < len(entries) <= _MAX_CASES:
            raise ValueError(f"{len(entries)} cases")
        cases = tuple(_parse(entry, vocab_size) for entry in entries)
        return Golden(str(value["reference"]), cases)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise BundleError(f"{path} is malformed ({cause}); export the bundle again") from None


def _parse(entry: Mapping[str, Any], vocab_size: int) -> Case:
    adapter = entry["adapter"]
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError("an adapter's name isn't text")
    tokens = np.array(entry["tokens"], np.int64)
    ids = np.array([row.split() for row in entry["ids"]], np.int64)
    log_p = np.array([row.split() for row in entry["log_p"]], np.float64)
    prompt = entry["prompt"]
    count = len(tokens)
    sound = (
        tokens.ndim == 1
        and type(prompt) is int
        and 0 < prompt <= count <= _MAX_LENGTH
        and ids.ndim == 2
        and ids.shape == log_p.shape
        and ids.shape[0] == count
        and 0 < ids.shape[1] <= min(_MAX_K, vocab_size)
        and min(tokens.min(), ids.min()) >= 0
        and max(tokens.max(), ids.max()) < vocab_size
        and np.isfinite(log_p).all()
        and log_p.max() <= 0
    )
    if not sound:
        raise ValueError("sizes or values that contradict each other")
    return Case(adapter, tokens, prompt, ids, log_p)


@dataclass(frozen=True)
class Divergence:
    """A candidate against a case's rows: `kl` (n,) in nats over k + 1 outcomes, `same_top1` (n,)."""

    kl: Float64
    same_top1: npt.NDArray[np.bool_]


def compare(case: Case, start: int, logits: Array) -> Divergence:
    """Candidate logits (m, vocab) against rows `start` to `start + m` of a case.

    Raises DataError when the logits hold NaN or infinity.
    """
    count = len(logits)
    ids, log_p = case.ids[start : start + count], case.log_p[start : start + count]
    kl, same = np.empty(count), np.empty(count, np.bool_)
    for at in range(0, count, _ROWS):
        part = slice(at, at + _ROWS)
        log_q = log_softmax(logits[part])
        if not np.isfinite(log_q).all():
            raise DataError(f"the model gives NaN or infinity at position {start + at} of a golden case")
        kl[part] = kl_of_listed(log_p[part], np.take_along_axis(log_q, ids[part], axis=1))
        same[part] = log_q.argmax(axis=1) == ids[part, 0]
    return Divergence(kl, same)
