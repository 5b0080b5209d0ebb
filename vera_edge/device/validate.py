"""Does the bundle do on this device what it was released to do? Golden vectors, and what only a device shows.

Checks: the files; drift of the prompt's pass and of single steps (other kernels run there); greedy text;
determinism; adapter swaps; memory that grows; the peak of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.device import facts, golden
from vera_edge.device.decoding import Steps
from vera_edge.device.golden import Case, Divergence, Golden
from vera_edge.device.session import Session
from vera_edge.errors import BundleError
from vera_edge.progress import Progress, silent

Float64 = npt.NDArray[np.float64]

# What the limits of a manifest are held against here; the others need the reference's full logits.
_STATISTICS: Mapping[str, Callable[[Float64], float]] = {
    "max_kl": lambda kl: float(kl.mean()),
    "max_kl_median": lambda kl: float(np.median(kl)),
    "max_kl_p90": lambda kl: float(np.quantile(kl, 0.9)),
    "max_kl_p99": lambda kl: float(np.quantile(kl, 0.99)),
}
_LEAK_RUNS = 12
_LEAK_BYTES = 8 << 20  # over all the runs; allocators keep a little slack


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it passed, and the figure in words."""

    name: str
    passed: bool
    detail: str


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
    """The outcome: every check, the drift by adapter, and what the device is. seconds: how long it took."""

    bundle: str
    checks: tuple[Check, ...]
    drift: tuple[Drift, ...]
    device: Mapping[str, Any]
    peak_rss: int | None
    seconds: float
    notes: tuple[str, ...] = ()

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
    where not None. Raises BundleError when the bundle is damaged or carries no golden vectors to judge by.
    """
    began = time.monotonic()
    progress("verifying", 0, 1)
    session = Session.open(folder, threads=threads, deep=True)
    manifest = session.manifest
    if manifest.golden is None:
        raise BundleError(f"{folder} carries no golden vectors; export it again with a reference to ask")
    cases = golden.read(manifest.path(manifest.golden), session.vocab_size)
    held = dict(manifest.limits) | {name: bound for name, bound in limits.items() if bound is not None}
    checks = [
        Check("files", True, f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB, all as listed")
    ]
    drift: list[Drift] = []
    for adapter in dict.fromkeys(case.adapter for case in cases.cases):
        progress("golden vectors", len(drift), len(manifest.adapters) + 1)
        found, kl = _drift(session, cases, adapter)
        drift.append(found)
        checks += _limit_checks(found, kl, held, manifest.mode == "branch")
    checks.append(_determinism(session, cases))
    checks += _swap(session, cases)
    progress("looking for leaks", 0, 1)
    checks.append(_leaks(session, cases.cases[0]))
    peak = facts.peak_rss()
    if max_memory is not None:
        checks.append(_memory(peak, max_memory))
    unheld = sorted(set(held) - set(_STATISTICS) - {"min_top1", "min_greedy"})
    notes = [f"not held on a device: {', '.join(unheld)}"] if unheld else []
    if not set(held) - set(unheld):
        notes.append("the bundle sets no drift limit that a device can hold: drift was measured, not judged")
    return Validation(
        manifest.digest,
        tuple(checks),
        tuple(drift),
        facts.device_facts() | {"threads": session.graph.threads},
        peak,
        round(time.monotonic() - began, 3),
        tuple(notes),
    )


def _use(session: Session, adapter: str | None) -> None:
    """Make `adapter` active; a merged bundle has nothing to choose."""
    session.swap("default" if session.manifest.mode == "merged" else adapter)


def _parts(session: Session, case: Case) -> Iterator[tuple[bool, Divergence]]:
    """The case's divergences, the prompt's chunk by chunk, then (True, ...) for each single step."""
    steps = Steps(session.decoder, session.decoder.cache(len(case.tokens)), session.vectors)
    for start, logits in steps.chunks(case.tokens[: case.prompt]):
        yield False, golden.compare(case, start, logits)
    for at in range(case.prompt, len(case.tokens)):
        yield True, golden.compare(case, at, steps.feed(case.tokens[None, at : at + 1])[0])


def _drift(session: Session, cases: Golden, adapter: str | None) -> tuple[Drift, Float64]:
    """Drift over the cases of one adapter, and the KL of every position."""
    _use(session, adapter)
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


def _determinism(session: Session, cases: Golden) -> Check:
    """The same tokens twice must give the same bits, and the same text."""
    case = cases.cases[0]
    _use(session, case.adapter)
    first, second = session.logits(case.tokens), session.logits(case.tokens)
    same = first.tobytes() == second.tobytes() and _generate(session, case) == _generate(session, case)
    detail = "logits and text repeat bit for bit" if same else "the same tokens give different logits"
    return Check("determinism", same, detail)


def _swap(session: Session, cases: Golden) -> list[Check]:
    """Swapping to each adapter, to none and back must change the logits and restore them exactly."""
    names = [name for name, entry in session.manifest.adapters.items() if entry.get("file")]
    if session.manifest.mode != "branch" or not names:
        return []
    tokens = cases.cases[0].tokens
    session.swap(names[0])
    before = session.logits(tokens)
    session.swap(None)
    base = session.logits(tokens)
    times = []
    for name in [*names, names[0]]:
        began = time.perf_counter()
        session.swap(name)
        times.append(time.perf_counter() - began)
    after = session.logits(tokens)
    restored, changed = before.tobytes() == after.tobytes(), before.tobytes() != base.tobytes()
    detail = f"{np.median(times) * 1e3:.2f} ms, "
    if not changed:
        detail += f"adapter {names[0]} changes nothing"
    else:
        detail += "logits restored bit for bit" if restored else "logits differ after swapping back"
    return [Check("swap", restored and changed, detail)]


def _leaks(session: Session, case: Case) -> Check:
    """Memory after many runs must be that after the first few."""
    _use(session, case.adapter)
    for _ in range(3):
        _generate(session, case)
    before = facts.rss()
    for _ in range(_LEAK_RUNS):
        _generate(session, case)
    after = facts.rss()
    if before is None or after is None:
        return Check("leaks", True, "the system doesn't tell how much memory a process holds")
    grown = after - before
    return Check("leaks", grown <= _LEAK_BYTES, f"{grown / 1e6:+.1f} MB over {_LEAK_RUNS} runs")


def _memory(peak: int | None, limit: int) -> Check:
    if peak is None:
        return Check(
            "memory", False, "the system doesn't tell the peak of memory, so the limit can't be held"
        )
    return Check("memory", peak <= limit, f"peak {peak / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
