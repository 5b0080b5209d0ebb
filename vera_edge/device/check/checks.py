"""What only a device shows, whatever the model: repeated runs, adapter swaps, memory that grows, its peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vera_edge.bundle.contents import Manifest
from vera_edge.device.runtime import int8_products as int8
from vera_edge.memory import rss

Run = Callable[[], object]  # what it gives is compared by ==
_LEAK_RUNS = 12
_LEAK_BYTES = 8 << 20  # over all the runs; allocators keep a little slack


class Swaps(Protocol):
    """An open bundle whose adapter can be changed."""

    @property
    def manifest(self) -> Manifest: ...

    def swap(self, adapter: str | None) -> None: ...


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it passed, and the figure in words."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Held:
    """The limits on one kind of model: those that a device can hold, and those that `vera-edge drift` holds,
    for which the reference's whole answers are needed."""

    here: frozenset[str]
    elsewhere: frozenset[str]


def unheld(limits: Collection[str], given: Collection[str], held: Held) -> list[Check]:
    """A failure for each of `limits` that nothing can be held to: no model of this kind is measured so, or it
    was `given` for this very run and can't be held on a device."""
    found = []
    for name in sorted(set(limits) - held.here):
        if name not in held.elsewhere:
            what = f"{name} isn't measured of this kind of model, but {', '.join(sorted(held.here))}"
            found.append(Check("limits", False, what))
        elif name in given:
            found.append(Check("limits", False, f"{name} can't be held on a device; `vera-edge drift` does"))
    return found


def use(model: Swaps, adapter: str | None) -> None:
    """Make `adapter` active; a merged bundle has nothing to choose."""
    model.swap("default" if model.manifest.mode == "merged" else adapter)


def repeats(run: Run, what: str) -> Check:
    """The same input twice must give the same bits."""
    same = run() == run()
    detail = f"{what} repeat bit for bit" if same else f"the same input gives different {what}"
    return Check("determinism", same, detail)


def swap(model: Swaps, run: Run, what: str) -> list[Check]:
    """Swapping to each adapter, to none and back must change what `run` gives and restore it exactly."""
    names = [name for name, entry in model.manifest.adapters.items() if entry.get("file")]
    if model.manifest.mode != "branch" or not names:
        return []
    model.swap(names[0])
    before = run()
    model.swap(None)
    base = run()
    times = []
    for name in [*names, names[0]]:
        began = time.perf_counter()
        model.swap(name)
        times.append(time.perf_counter() - began)
    restored, changed = before == run(), before != base
    detail = f"{np.median(times) * 1e3:.2f} ms, "
    if not changed:
        detail += f"adapter {names[0]} changes nothing"
    else:
        detail += f"{what} restored bit for bit" if restored else f"{what} differ after swapping back"
    return [Check("swap", restored and changed, detail)]


def leaks(run: Run) -> Check:
    """Memory after many runs must be that after the first few."""
    for _ in range(3):
        run()
    before = rss()
    for _ in range(_LEAK_RUNS):
        run()
    after = rss()
    if before is None or after is None:
        return Check("leaks", True, "the system doesn't tell how much memory a process holds")
    grown = after - before
    return Check("leaks", grown <= _LEAK_BYTES, f"{grown / 1e6:+.1f} MB over {_LEAK_RUNS} runs")


def int8_products(graph: Path) -> list[Check]:
    """Products of uint8 and int8 must not overflow on this processor, whatever program runs them.

    Nothing for a graph without any. Raises BundleError when `graph` isn't an ONNX file.
    """
    found = int8.of_graph(graph)
    if not found.weights:
        return []
    count = f"{len(found.overflowing)} of {len(found.weights)} products of uint8 and int8 overflow"
    if not found.overflowing:
        detail = f"{len(found.weights)} products of uint8 and int8, none of which can overflow"
    elif int8.processor_clips():
        detail = (
            f"{count} on this processor, which has no VNNI: vera-edge runs them exactly and slower, other "
            "programs give wrong values; export the bundle again"
        )
        return [Check("int8 products", False, detail)]
    else:
        detail = f"{count} on x86 without VNNI, and are exact on this processor"
    return [Check("int8 products", True, detail)]


def memory(peak: int | None, limit: int) -> Check:
    """The peak of this process against a limit, both in bytes."""
    if peak is None:
        return Check(
            "memory", False, "the system doesn't tell the peak of memory, so the limit can't be held"
        )
    return Check("memory", peak <= limit, f"peak {peak / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
