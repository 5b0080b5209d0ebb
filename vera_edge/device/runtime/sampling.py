"""From logits to a token: greedy, or drawn after repetition penalty, temperature, top-k, top-p and min-p.

The filters run in the order and with the meaning of transformers' logits processors, so that settings carry
over. Random numbers come from numpy's PCG64: the same logits and seed give the same text everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float64, Tokens
from vera_edge.errors import PlanError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy: the most likely token, the lowest id on a tie.

    temperature: 0 is greedy, 1 the model's own distribution. top_k: keep the k most likely tokens, 0 for all.
    top_p: keep the smallest set of tokens that holds this much probability. min_p: keep tokens at least this
    fraction as likely as the most likely one. repetition_penalty: divide positive logits of tokens seen
    before by it, multiply negative ones (Keskar et al., CTRL, 2019). seed: None draws another text each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def seeded(self, seed: int) -> Sampling:
        """The same with another seed."""
        return replace(self, seed=seed)

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be {range_}")


class Sampler:
    """Chooses tokens for one text."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._draw = np.random.Generator(np.random.PCG64(sampling.seed))

    def pick(self, logits: npt.NDArray[Any], seen: Tokens) -> int:
        """The next token, given logits (vocab,) and the tokens of prompt and text so far."""
        if self.sampling.repetition_penalty != 1.0:
            logits = penalize(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        cumulative = np.cumsum(probabilities(logits, self.sampling))
        # Scaled by the last sum, which rounding keeps a little off 1.
        return int(np.searchsorted(cumulative, self._draw.random() * cumulative[-1], side="right"))


def penalize(logits: npt.NDArray[Any], seen: Tokens, penalty: float) -> npt.NDArray[Any]:
    """A copy of logits (vocab,) with the tokens in `seen` made less likely."""
    result = logits.astype(np.float32)
    ids = np.unique(seen)
    values = result[ids]
    result[ids] = np.where(values < 0, values * penalty, values / penalty)
    return result


def probabilities(logits: npt.NDArray[Any], sampling: Sampling) -> Float64:
    """Probabilities (vocab,) after temperature, top-k, top-p and min-p, in this order; they sum to 1."""
    # Less the largest first: a temperature near 0 then gives one 1 and zeros, never infinity less infinity.
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        threshold = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores[scores < threshold] = -np.inf
    p: Float64 = np.exp(scores)
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(p, kind="stable")
        # Ascending: dropped are the least likely ones that together hold no more than 1 - top_p.
        dropped = order[np.cumsum(p[order]) <= 1 - sampling.top_p]
        p[dropped[dropped != order[-1]]] = 0
        p /= p.sum()
    if sampling.min_p > 0:
        p[p < sampling.min_p * p.max()] = 0
        p /= p.sum()
    return p
