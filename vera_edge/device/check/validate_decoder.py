"""The golden vectors of a decoder on this device, whichever runtime runs it.

Drift of the prompt's pass and of single steps (other kernels run there); greedy text; determinism; adapter
swaps; memory that grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32, Float64, Tokens
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import checks, golden
from vera_edge.device.check.checks import Check, Held
from vera_edge.device.check.golden import Case, Divergence, Golden
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.session import Session
from vera_edge.progress import Progress

# What the limits of a manifest are held against here; the others need the reference's full logits.
_STATISTICS: Mapping[str, Callable[[Float64], float]] = {
    "max_kl": lambda kl: float(kl.mean()),
    "max_kl_median": lambda kl: float(np.median(kl)),
    "max_kl_p90": lambda kl: float(np.quantile(kl, 0.9)),
    "max_kl_p99": lambda kl: float(np.quantile(kl, 0.99)),
}
HELD = Held(
    frozenset({*_STATISTICS, "min_top1", "min_greedy"}),
    frozenset(
        {
            "max_kl_p99.9",
            "max_reverse_kl",
            "min_top5",
            "max_flips",
            "max_right_to_wrong",
            "max_perplexity_ratio",
            "max_delta_p_rms",
            "max_logit_rms",
            "min_cosine",
            "min_retained",
        }
    ),
)


@dataclass(frozen=True)
class Drift:
    """Divergence from the reference over the golden cases of one adapter; KL in nats, shares from 0 to 1.

    `kl` and `same_top1` are over all positions; prompt_kl is the prompts' alone, step_kl that of the
    continuations fed one token at a time. greedy: share of the continuations' tokens generated before the
    first that differs.
    """

    adapter: str | None
    positions: int
    kl: float
    kl_p99: float
    kl_max: float
    prompt_kl: float
    step_kl: float
    same_top1: float
    greedy: float


class OpenDecoder(Protocol):
    """An open decoder bundle, in whatever runs it."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def vocab_size(self) -> int: ...

    def swap(self, adapter: str | None) -> None:
        """Make an adapter of the bundle active, "default" the one it names, None for the base alone."""

    def logits(self, tokens: Tokens) -> Float32:
        """Teacher-forced logits (n, vocab_size) of one sequence (n,)."""

    def parts(self, tokens: Tokens, prompt: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The same as (start, rows), valid until the next: the prompt's in pieces, then token by token."""

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Up to `count` tokens that it goes on with, without one that ends the text."""

    def ends_text(self, token: int) -> bool: ...


@dataclass(frozen=True)
class OnnxDecoder:
    """A Session as an OpenDecoder."""

    session: Session

    @property
    def manifest(self) -> Manifest:
        return self.session.manifest

    @property
    def vocab_size(self) -> int:
        return self.session.vocab_size

    def swap(self, adapter: str | None) -> None:
        self.session.swap(adapter)

    def logits(self, tokens: Tokens) -> Float32:
        return self.session.logits(tokens)

    def parts(self, tokens: Tokens, prompt: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        session, count = self.session, len(tokens)
        steps = Steps(session.decoder, session.decoder.cache(count), session.vectors, whole=count)
        yield from steps.chunks(tokens[:prompt])
        for at in range(prompt, count):
            yield at, steps.feed(tokens[None, at : at + 1])[0]

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        generation = self.session.generate(tokens, max_tokens=count)
        for _ in generation:
            pass
        return generation.tokens

    def ends_text(self, token: int) -> bool:
        return token in self.session.decoder.ends


def measure(
    model: OpenDecoder, limits: Mapping[str, float], progress: Progress
) -> tuple[list[Drift], list[Check]]:
    """Every check of an open decoder against its golden vectors. Raises BundleError when those don't fit."""
    manifest = model.manifest
    cases = golden.read(manifest.path(manifest.golden or ""), model.vocab_size)
    drift: list[Drift] = []
    found: list[Check] = []
    for adapter in dict.fromkeys(case.adapter for case in cases.cases):
        progress("golden vectors", len(drift), len(manifest.adapters) + 1)
        measured, kl = _drift(model, cases, adapter)
        drift.append(measured)
        found += _limit_checks(measured, kl, limits, manifest.mode == "branch")
    case = cases.cases[0]

    def logits() -> bytes:
        return model.logits(case.tokens).tobytes()

    checks.use(model, case.adapter)
    found.append(checks.repeats(lambda: (logits(), _generate(model, case)), "logits and text"))
    found += checks.swap(model, logits, "logits")
    progress("looking for leaks", 0, 1)
    checks.use(model, case.adapter)
    return drift, [*found, checks.leaks(lambda: _generate(model, case))]


def _drift(model: OpenDecoder, cases: Golden, adapter: str | None) -> tuple[Drift, Float64]:
    """Drift over the cases of one adapter, and the KL of every position."""
    checks.use(model, adapter)
    kl: dict[bool, list[Float64]] = {False: [], True: []}
    same, agreed, length = [], 0, 0
    for case in (case for case in cases.cases if case.adapter == adapter):
        for start, logits in model.parts(case.tokens, case.prompt):
            found: Divergence = golden.compare(case, start, logits)
            kl[start >= case.prompt].append(found.kl)
            same.append(found.same_top1)
        agreed += _agreement(model, case)
        length += len(case.continuation)
    prompt = np.concatenate(kl[False])
    steps = np.concatenate(kl[True]) if kl[True] else np.zeros(0)
    all_kl = np.concatenate([prompt, steps])
    drift = Drift(
        adapter,
        len(all_kl),
        float(all_kl.mean()),
        float(np.quantile(all_kl, 0.99)),
        float(all_kl.max()),
        float(prompt.mean()),
        float(steps.mean()) if len(steps) else 0.0,
        float(np.concatenate(same).mean()),
        agreed / length if length else 1.0,
    )
    return drift, all_kl


def _agreement(model: OpenDecoder, case: Case) -> int:
    """How many tokens of the reference's continuation the device generates before it differs."""
    if not case.continuation:
        return 0
    found = _generate(model, case)
    for count, (ours, theirs) in enumerate(zip(found, case.continuation, strict=False)):
        if ours != theirs:
            return count
    # A token that ends the text isn't among the generated ones, but was chosen.
    ended = model.ends_text(case.continuation[-1]) and len(found) == len(case.continuation) - 1
    return len(found) + ended


def _generate(model: OpenDecoder, case: Case) -> list[int]:
    return model.greedy(case.tokens[: case.prompt], len(case.continuation))


def _limit_checks(drift: Drift, kl: Float64, limits: Mapping[str, float], branch: bool) -> list[Check]:
    """The limits that a device can hold, against this adapter's figures."""
    who = drift.adapter or ("base" if branch else "model")
    checks = []
    for name, bound in sorted(limits.items()):
        if name in _STATISTICS:
            value = _STATISTICS[name](kl)
            checks.append(Check(f"drift ({who})", value <= bound, f"{name}: {value:.3g}, limit {bound:g}"))
        elif name in ("min_top1", "min_greedy"):
            value = drift.same_top1 if name == "min_top1" else drift.greedy
            checks.append(Check(f"drift ({who})", value >= bound, f"{name}: {value:.4f}, limit {bound:g}"))
    return checks
