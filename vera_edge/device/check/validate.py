"""Does the bundle do on this device what it was released to do? Golden vectors, and what only a device shows.

For a decoder: the files; int8 products that overflow; drift of the prompt's pass and of single steps (other
kernels run there); greedy text; determinism; adapter swaps; memory that grows; the peak of memory. For an
encoder see validate_encoder.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vera_edge.arrays import Float64
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import checks, golden, hardware, validate_encoder
from vera_edge.device.check.checks import Check, Held
from vera_edge.device.check.golden import Case, Divergence, Golden
from vera_edge.device.check.validate_encoder import EncoderDrift
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, BundleWarning
from vera_edge.memory import peak_rss
from vera_edge.progress import Progress, silent

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


@dataclass(frozen=True)
class Validation:
    """The outcome: every check, the drift by adapter, and what the device is. seconds: how long it took.

    drift: of a decoder, encoder_drift: of an encoder.
    """

    bundle: str
    checks: tuple[Check, ...]
    drift: tuple[Drift, ...]
    device: Mapping[str, Any]
    peak_rss: int | None
    seconds: float
    notes: tuple[str, ...] = ()
    encoder_drift: tuple[EncoderDrift, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"passed": self.passed}


def validate(
    folder: Path,
    threads: int | None = None,
    max_memory: int | None = None,
    limits: Mapping[str, float | None] = MappingProxyType({}),
    progress: Progress = silent,
) -> Validation:
    """Validate the bundle in `folder` on this device.

    max_memory: bytes that this process may have held at its peak. limits: replace those of the manifest,
    where not None. Raises BundleError when the bundle is damaged or carries no golden vectors to judge by,
    PlanError when nothing can keep one of `limits`.
    """
    began, given = time.monotonic(), {name: bound for name, bound in limits.items() if bound is not None}
    bundle.check_limits(given, "options")
    progress("verifying", 0, 1)
    encoder = bundle.read(folder).kind == "encoder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BundleWarning)  # which is a check of its own here
        model = Encoder.open(folder, threads=threads) if encoder else Session.open(folder, threads=threads)
    manifest = model.manifest
    if manifest.golden is None:
        raise BundleError(f"{folder} carries no golden vectors; `vera-edge golden` puts them there")
    held = dict(manifest.limits) | given
    products = checks.int8_products(manifest.path(manifest.model))
    drift: list[Drift] = []
    encoder_drift: list[EncoderDrift] = []
    if isinstance(model, Encoder):
        known = validate_encoder.HELD[model.answers]
        encoder_drift, found = validate_encoder.measure(model, held, progress)
    else:
        known = HELD
        drift, found = _measure(model, held, progress)
    asked = [*(one.adapter for one in drift), *(one.adapter for one in encoder_drift)]
    files = f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB, all as listed"
    peak = peak_rss()
    memory = [checks.memory(peak, max_memory)] if max_memory is not None else []
    return Validation(
        manifest.digest,
        (Check("files", True, files), *products, *checks.unheld(held, given, known), *found, *memory),
        tuple(drift),
        hardware.hardware_info() | {"threads": model.graph.threads},
        peak,
        round(time.monotonic() - began, 3),
        (
            *_notes(set(held), known.here),
            *_unasked(manifest, asked),
        ),
        tuple(encoder_drift),
    )


def _notes(held: set[str], known: Collection[str]) -> tuple[str, ...]:
    """What a reader of the result has to know about the limits `held`, of which `known` can be held here."""
    unheld = sorted(held - set(known))
    notes = [f"not held on a device: {', '.join(unheld)}"] if unheld else []
    if not held - set(unheld):
        notes.append("the bundle sets no drift limit that a device can hold: drift was measured, not judged")
    return tuple(notes)


def _unasked(manifest: Manifest, asked: Collection[str | None]) -> list[str]:
    """A note where a branch has adapters that no golden vectors are of."""
    names = manifest.adapters if manifest.mode == "branch" else ()
    left = [name for name in names if name not in asked]
    return [f"there are no golden vectors of adapter {', '.join(left)}: not judged"] if left else []


def _measure(
    session: Session, limits: Mapping[str, float], progress: Progress
) -> tuple[list[Drift], list[Check]]:
    """Every check of an open decoder against its golden vectors. Raises BundleError when those don't fit."""
    manifest = session.manifest
    cases = golden.read(manifest.path(manifest.golden or ""), session.vocab_size)
    drift: list[Drift] = []
    found: list[Check] = []
    for adapter in dict.fromkeys(case.adapter for case in cases.cases):
        progress("golden vectors", len(drift), len(manifest.adapters) + 1)
        measured, kl = _drift(session, cases, adapter)
        drift.append(measured)
        found += _limit_checks(measured, kl, limits, manifest.mode == "branch")
    case = cases.cases[0]

    def logits() -> bytes:
        return session.logits(case.tokens).tobytes()

    checks.use(session, case.adapter)
    found.append(checks.repeats(lambda: (logits(), _generate(session, case)), "logits and text"))
    found += checks.swap(session, logits, "logits")
    progress("looking for leaks", 0, 1)
    checks.use(session, case.adapter)
    return drift, [*found, checks.leaks(lambda: _generate(session, case))]


def _parts(session: Session, case: Case) -> Iterator[tuple[bool, Divergence]]:
    """The case's divergences, the prompt's chunk by chunk, then (True, ...) for each single step."""
    count = len(case.tokens)
    steps = Steps(session.decoder, session.decoder.cache(count), session.vectors, whole=count)
    for start, logits in steps.chunks(case.tokens[: case.prompt]):
        yield False, golden.compare(case, start, logits)
    for at in range(case.prompt, len(case.tokens)):
        yield True, golden.compare(case, at, steps.feed(case.tokens[None, at : at + 1])[0])


def _drift(session: Session, cases: Golden, adapter: str | None) -> tuple[Drift, Float64]:
    """Drift over the cases of one adapter, and the KL of every position."""
    checks.use(session, adapter)
    kl: dict[bool, list[Float64]] = {False: [], True: []}
    same, agreed, length = [], 0, 0
    for case in (case for case in cases.cases if case.adapter == adapter):
        for single, found in _parts(session, case):
            kl[single].append(found.kl)
            same.append(found.same_top1)
        agreed += _agreement(session, case)
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


def _agreement(session: Session, case: Case) -> int:
    """How many tokens of the reference's continuation the device generates before it differs."""
    if not case.continuation:
        return 0
    found = _generate(session, case)
    for count, (ours, theirs) in enumerate(zip(found, case.continuation, strict=False)):
        if ours != theirs:
            return count
    # A token that ends the text isn't among the generated ones, but was chosen.
    ended = case.continuation[-1] in session.decoder.ends and len(found) == len(case.continuation) - 1
    return len(found) + ended


def _generate(session: Session, case: Case) -> list[int]:
    generation = session.generate(case.tokens[: case.prompt], max_tokens=len(case.continuation))
    for _ in generation:
        pass
    return generation.tokens


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
