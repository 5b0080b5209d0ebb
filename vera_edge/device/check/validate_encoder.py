"""The golden vectors of an encoder on this device: tokens, drift, padding, and what only a device shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vera_edge import divergence
from vera_edge.arrays import Float32
from vera_edge.device.check import answers, checks, golden_encoder
from vera_edge.device.check.checks import Check, Held
from vera_edge.device.check.golden_encoder import EncoderCase
from vera_edge.device.runtime.encoder import CLASSES, EMBEDDINGS, Encoder
from vera_edge.errors import BundleError, DataError
from vera_edge.progress import Progress

_CLASSES = Held(frozenset({"max_kl", "min_top1"}), frozenset({"min_retained"}))
# By what an encoder answers.
HELD: Mapping[str, Held] = {
    EMBEDDINGS: Held(
        frozenset({"min_cosine"}), frozenset({"min_rank_correlation", "min_overlap", "min_retained"})
    ),
    answers.CLASS: _CLASSES,
    answers.LABELS: _CLASSES,
    answers.VALUES: Held(
        frozenset({"max_relative_error", "max_largest_error", "min_rank_correlation"}),
        frozenset({"min_retained"}),
    ),
}
# Other kernels run for many rows than for few; of what they give, this share of its scale may differ.
_BATCH_ERROR = 0.01


@dataclass(frozen=True)
class EncoderDrift:
    """Divergence from the reference over the texts of one adapter.

    cosine, cosine_min: mean and least over the texts' embeddings. kl, same_top1: mean KL divergence (nats) of
    the classes or labels, and the share of texts whose class, or every label, is the same. relative_error,
    largest_error: mean and largest difference of values, in standard deviations of the reference's;
    rank_correlation: Spearman's of them over the texts, the least where there are several. None where the
    model gives something else.
    """

    adapter: str | None
    texts: int
    cosine: float | None = None
    cosine_min: float | None = None
    kl: float | None = None
    same_top1: float | None = None
    relative_error: float | None = None
    largest_error: float | None = None
    rank_correlation: float | None = None


def measure(
    encoder: Encoder, limits: Mapping[str, float], progress: Progress
) -> tuple[list[EncoderDrift], list[Check]]:
    """Every check of an open encoder against its golden vectors. Raises BundleError when those don't fit."""
    manifest = encoder.manifest
    cases = golden_encoder.read(manifest.path(manifest.golden or ""))
    drift: list[EncoderDrift] = []
    found = [_tokens(encoder, cases)]
    for adapter in dict.fromkeys(case.adapter for case in cases):
        progress("golden vectors", len(drift), len(manifest.adapters) + 1)
        checks.use(encoder, adapter)
        own = [case for case in cases if case.adapter == adapter]
        drift.append(_drift(encoder, adapter, own))
        found += _limits(drift[-1], limits, manifest.mode == "branch")
    texts = [case.encoded for case in cases]

    def run() -> bytes:
        return encoder.outputs(texts).tobytes()

    what = "class logits" if encoder.gives == CLASSES else "embeddings"
    found += [_batches(encoder, cases), checks.repeats(run, what), *checks.swap(encoder, run, what)]
    progress("looking for leaks", 0, 1)
    return drift, [*found, checks.leaks(run)]


def _tokens(encoder: Encoder, cases: Sequence[EncoderCase]) -> Check:
    """The tokenizer must cut the texts as it did where the reference was asked."""
    encoded = encoder.encode([case.text for case in cases])
    wrong = [
        case.text
        for case, one in zip(cases, encoded, strict=True)
        if one.ids.tolist() != case.tokens.tolist()
    ]
    detail = f"other token ids for {wrong[0][:40]!r}" if wrong else f"{len(cases)} texts, the same ids"
    return Check("tokens", not wrong, detail)


def _drift(encoder: Encoder, adapter: str | None, cases: Sequence[EncoderCase]) -> EncoderDrift:
    # One at a time, so that padding has a check of its own.
    ours = np.concatenate([encoder.outputs([case.encoded]) for case in cases])
    theirs = np.stack([case.values for case in cases])
    if ours.shape != theirs.shape:
        raise BundleError(
            f"{encoder.manifest.folder} gives {ours.shape[1]} values and its golden vectors hold "
            f"{theirs.shape[1]}; export the bundle again"
        )
    if not np.isfinite(ours).all():
        raise DataError(f"{encoder.manifest.folder} gives NaN or infinity for a text of its golden vectors")
    return EncoderDrift(adapter, len(cases), **_figures(encoder.answers, theirs, ours))


def _figures(kind: str, theirs: Float32, ours: Float32) -> dict[str, float]:
    """The figures of EncoderDrift that there are for this kind of answers: (n, size) of both."""
    if kind == EMBEDDINGS:
        cosine = _cosine(ours, theirs)
        return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min())}
    if kind == answers.VALUES:
        errors = answers.relative_errors(theirs, ours)
        ranks = [answers.rank_correlation(theirs[:, at], ours[:, at]) for at in range(theirs.shape[1])]
        return {
            "relative_error": float(errors.mean()),
            "largest_error": float(errors.max()),
            "rank_correlation": float(np.min(ranks)),
        }
    if kind == answers.LABELS:
        kl = divergence.kl_of_labels(theirs, ours)
        same = answers.same_labels(theirs, ours).all(axis=1)
    else:
        kl = divergence.kl(divergence.log_softmax(theirs), divergence.log_softmax(ours))
        same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    return {"kl": float(kl.mean()), "same_top1": float(same.mean())}


def _cosine(ours: Float32, theirs: Float32) -> Float32:
    product = (ours.astype(np.float64) * theirs).sum(axis=1)
    found: Float32 = product / np.maximum(
        np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1), np.float32(1e-12)
    )
    return found


def _limits(drift: EncoderDrift, limits: Mapping[str, float], branch: bool) -> list[Check]:
    """The limits that a device can hold, against this adapter's figures."""
    who = drift.adapter or ("base" if branch else "model")
    figures = {
        "min_cosine": drift.cosine,
        "max_kl": drift.kl,
        "min_top1": drift.same_top1,
        "max_relative_error": drift.relative_error,
        "max_largest_error": drift.largest_error,
        "min_rank_correlation": drift.rank_correlation,
    }
    found = []
    for name, bound in sorted(limits.items()):
        value = figures.get(name)
        if value is not None:
            passed = value <= bound if name.startswith("max_") else value >= bound
            found.append(Check(f"drift ({who})", passed, f"{name}: {value:.4g}, limit {bound:g}"))
    return found


def _batches(encoder: Encoder, cases: Sequence[EncoderCase]) -> Check:
    """A text in a padded batch must give what it gives alone."""
    checks.use(encoder, cases[0].adapter)
    texts = [case.encoded for case in cases]
    alone, together = encoder.outputs(texts, batch=1), encoder.outputs(texts, batch=len(texts))
    error = float(np.abs(together - alone).max() / np.abs(alone).max())
    return Check("batches", error <= _BATCH_ERROR, f"padding moves {error:.2g} of the scale at most")
