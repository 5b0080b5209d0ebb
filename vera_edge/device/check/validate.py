"""Does the bundle do on this device what it was released to do? Golden vectors, and what only a device shows.

The files; int8 products that overflow; what validate_decoder and validate_encoder look at; peak memory.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import checks, hardware, validate_decoder, validate_encoder
from vera_edge.device.check.checks import Check
from vera_edge.device.check.validate_decoder import Drift, OnnxDecoder
from vera_edge.device.check.validate_encoder import EncoderDrift
from vera_edge.device.llama.bundle import LlamaBundle
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, BundleWarning
from vera_edge.memory import peak_rss
from vera_edge.progress import Progress, silent


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
    PlanError when nothing can keep one of `limits`,
    TargetError for a GGUF bundle without llama-cpp-python.
    """
    began, given = time.monotonic(), {name: bound for name, bound in limits.items() if bound is not None}
    bundle.check_limits(given, "options")
    progress("verifying", 0, 1)
    model, used = _opened(folder, threads)
    manifest = model.manifest
    if manifest.golden is None:
        raise BundleError(f"{folder} carries no golden vectors; `vera-edge golden` puts them there")
    held = dict(manifest.limits) | given
    products = [] if manifest.is_gguf else checks.int8_products(manifest.path(manifest.model))
    drift: list[Drift] = []
    encoder_drift: list[EncoderDrift] = []
    if isinstance(model, Encoder):
        known = validate_encoder.HELD[model.answers]
        encoder_drift, found = validate_encoder.measure(model, held, progress)
    else:
        known = validate_decoder.HELD
        drift, found = validate_decoder.measure(model, held, progress)
    asked = [*(one.adapter for one in drift), *(one.adapter for one in encoder_drift)]
    files = f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB, all as listed"
    peak = peak_rss()
    memory = [checks.memory(peak, max_memory)] if max_memory is not None else []
    return Validation(
        manifest.digest,
        (Check("files", True, files), *products, *checks.unheld(held, given, known), *found, *memory),
        tuple(drift),
        hardware.hardware_info() | {"threads": used},
        peak,
        round(time.monotonic() - began, 3),
        (
            *_notes(set(held), known.here),
            *_unasked(manifest, asked),
        ),
        tuple(encoder_drift),
    )


def _opened(folder: Path, threads: int | None) -> tuple[Encoder | OnnxDecoder | LlamaBundle, int]:
    """The bundle verified and open in the runtime that it is for, and how many threads run it."""
    manifest = bundle.read(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BundleWarning)  # which is a check of its own here
        if manifest.is_gguf:
            model = LlamaBundle.open(folder, threads=threads)
            return model, model.runner.threads
        if manifest.kind == "encoder":
            encoder = Encoder.open(folder, threads=threads, reread=True)
            return encoder, encoder.graph.threads
        session = Session.open(folder, threads=threads, reread=True)
    return OnnxDecoder(session), session.graph.threads


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
