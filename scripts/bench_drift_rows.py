"""One row of the drift tables: how it is measured, kept and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.exporting.exporter import Runner
from vera_edge.measuring import evaluate
from vera_edge.storage.files import sha256_bytes, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.text.windows import Windows

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

PEFT = "PEFT merge_and_unload into NF4"
BARE = "*the base without the adapter*"


@dataclass(frozen=True)
class Made:
    """Something to measure. bits: per weight of the linear layers, scales and zero points included.

    size: bytes on disk, None when it can't be written or isn't. speed: tokens a second when it's called.
    """

    runner: Runner
    bits: float
    size: int | None = None
    speed: Callable[[], float] | None = None


@dataclass(frozen=True)
class Way:
    """A way to ship. `make` does it; `facts` are what its row depends on beside model and text.

    spoken: its speed is measured too.
    """

    name: str
    make: Callable[[], Made]
    facts: str = ""
    spoken: bool = False


@dataclass(frozen=True)
class Figures:
    """What one text showed. kl, effect: mean KL in nats to the artefact, to the base without the adapter."""

    kl: float
    kl_error: float
    effect: float
    flips: float
    top1: float
    perplexity: float
    reference_perplexity: float

    @property
    def share(self) -> float:
        """Of the adapter's effect, what is lost."""
        return self.kl / self.effect


@dataclass(frozen=True)
class Row:
    """A way's figures by text."""

    name: str
    bits: float
    size: int | None
    speed: float | None
    texts: Mapping[str, Figures]
    facts: str = ""


@dataclass
class Remembered:
    """A Runner whose answers are kept on disk, in `folder`: the reference runs once for all rows and runs."""

    open: Callable[[], Runner]
    folder: Path
    vocab_size: int
    _runner: Runner | None = None

    def logits(self, tokens: Int64) -> Float32:
        path = self.folder / f"{sha256_bytes(tokens.tobytes())[:16]}.npy"
        if not path.is_file():
            self._runner = self._runner or self.open()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, self._runner.logits(tokens))
            partial.replace(path)
        found: Float32 = np.load(path, mmap_mode="r")
        return found


@dataclass(frozen=True)
class Bench:
    """Measures ways against the model as trained, and keeps their rows in `folder`."""

    reference: Remembered
    base: Remembered
    texts: Mapping[str, Windows]
    folder: Path
    facts: str
    with_speed: bool = False
    again: frozenset[str] = field(default_factory=frozenset)

    def kept(self) -> list[Row]:
        """Every row that was kept for this model, adapter and text."""
        found = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return [row for row in found if row.facts.startswith(self.facts)]

    def row(self, way: Way) -> Row:
        """The row of a way: as it was kept when nothing that it depends on has changed, else measured."""
        path, facts = self.folder / f"{_slug(way.name)}.json", f"{self.facts} {way.facts}"
        if path.is_file() and way.name not in self.again:
            kept = _read(path)
            if kept.facts == facts and not (self.with_speed and way.spoken and kept.speed is None):
                return kept
        made = way.make()
        texts = {name: self._figures(name, made.runner) for name in self.texts}
        speed = made.speed() if self.with_speed and made.speed else None
        row = Row(way.name, made.bits, made.size, speed, texts, facts)
        write_atomic(path, canonical_json(asdict(row)))
        return row

    @cached_property
    def bare(self) -> Row:
        """The base without the adapter: what remains when the adapter is lost."""
        return self.row(Way(BARE, lambda: Made(self.base, 0.0)))

    def _figures(self, text: str, runner: Runner) -> Figures:
        own = evaluate.measure(self.reference, runner, self.texts[text]).fidelity
        kl = own.kl.mean.value
        return Figures(
            kl=kl,
            kl_error=own.kl.mean.standard_error,
            effect=kl if runner is self.base else self.bare.texts[text].kl,
            flips=own.flips.value,
            top1=own.same_top1.value,
            perplexity=own.perplexity.value,
            reference_perplexity=own.reference_perplexity.value,
        )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _read(path: Path) -> Row:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    value["texts"] = {name: Figures(**figures) for name, figures in value["texts"].items()}
    return Row(**value)
