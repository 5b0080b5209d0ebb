"""Golden vectors of an encoder: what the model as trained gives for a few texts, carried in the bundle.

Made where the reference can run, read where it can't. Each case is a text, its token ids, and the reference's
embedding or class logits. Short and long texts are among them, so that a batch of all has padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Int64
from vera_edge.device.check.golden import FORMAT
from vera_edge.device.runtime.encoder import CLASSES, EMBEDDINGS, Encoded, Encoder
from vera_edge.errors import BundleError, MismatchError
from vera_edge.progress import Progress, silent
from vera_edge.storage.json_text import TABLE, canonical_json, read_json

Reference = Callable[[Int64], Float32]  # token ids (n,) to hidden states (n, d) or class logits (classes,)

_MAX_CASES, _MAX_VALUES = 256, 1 << 16
TEXTS = (
    "A train leaves at nine.",
    "The weather was fine all week, and we walked along the river every evening.",
    "How do I change a flat tyre on a bicycle without taking the wheel off?",
    "The parcel arrived late, the box was crushed, and nobody answered when I called.",
    "Excellent service; I will come again.",
    "Bread is made of flour, water, salt and yeast, kneaded, left to rise, and baked in a hot oven until the "
    "crust is brown and the loaf sounds hollow when you knock on it.",
    "def largest(values): return max(values)",
    "Turn left.",
)


@dataclass(frozen=True)
class EncoderCase:
    """One text under one adapter (None: the base, or a merged bundle): tokens (n,), values (d,)."""

    adapter: str | None
    text: str
    tokens: Int64
    values: Float32

    @property
    def encoded(self) -> Encoded:
        """The tokens as the model takes them."""
        return Encoded(self.tokens, np.zeros_like(self.tokens))


def make(
    references: Mapping[str | None, Reference],
    encoder: Encoder,
    texts: Sequence[str] = TEXTS,
    progress: Progress = silent,
) -> tuple[EncoderCase, ...]:
    """Ask each of `references` (by adapter name, None for the base) about `texts`, pooled as the bundle says.

    encoder: the bundle's own, so that token ids are those of the device. Raises MismatchError when the
    reference gives something else than the bundle.
    """
    cases: list[EncoderCase] = []
    encoded = encoder.encode(texts)
    for adapter, ask in references.items():
        for text, one in zip(texts, encoded, strict=True):
            progress("making golden vectors", len(cases), len(references) * len(texts))
            values = ask(one.ids)
            if values.ndim != (1 if encoder.gives == CLASSES else 2):
                raise MismatchError(f"the reference gives no {encoder.gives}, which the bundle does")
            if encoder.gives == EMBEDDINGS:
                values = encoder.pooling.embeddings(values[None], np.ones((1, len(one.ids)), np.int64))[0]
            cases.append(EncoderCase(adapter, text, one.ids, values))
    return tuple(cases)


def to_bytes(cases: Sequence[EncoderCase], reference: str) -> bytes:
    """The content of golden.json; `reference` says in a sentence what was asked."""
    listed = [
        {
            "adapter": case.adapter,
            "text": case.text,
            "tokens": case.tokens.tolist(),
            "values": " ".join(f"{value:.7g}" for value in case.values.tolist()),
        }
        for case in cases
    ]
    return canonical_json({"format": FORMAT, "reference": reference, "cases": listed})


def read(path: Path) -> tuple[EncoderCase, ...]:
    """Read golden vectors, checking sizes and types. Raises BundleError when they are malformed."""
    value = read_json(path, BundleError, TABLE)
    if value.get("format") != FORMAT:
        raise BundleError(
            f"{path} has format {value.get('format')!r} and vera-edge reads {FORMAT}; update it"
        )
    try:
        entries = value["cases"]
        if not 0 < len(entries) <= _MAX_CASES:
            raise ValueError(f"{len(entries)} cases")
        cases = tuple(_parse(entry) for entry in entries)
        if len({len(case.values) for case in cases}) != 1:
            raise ValueError("values of several sizes")
        return cases
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise BundleError(f"{path} is malformed ({cause}); export the bundle again") from None


def _parse(entry: Mapping[str, Any]) -> EncoderCase:
    adapter, text = entry["adapter"], entry["text"]
    tokens = np.array(entry["tokens"], np.int64)
    values = np.array(entry["values"].split(), np.float32)
    sound = (
        (adapter is None or isinstance(adapter, str))
        and isinstance(text, str)
        and tokens.ndim == 1
        and 0 < len(values) <= _MAX_VALUES
        and len(tokens) > 0
        and tokens.min() >= 0
        and np.isfinite(values).all()
    )
    if not sound:
        raise ValueError("sizes or values that contradict each other")
    return EncoderCase(adapter, text, tokens, values)
