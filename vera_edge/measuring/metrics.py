"""What one token's logits say about two models. numpy only.

Every figure is computed in float64 from the float32 logits, through log-softmax, so that two equal models
give exactly 0 and the smallest drift that float32 logits can carry is still seen. With p and q the
probabilities of reference and candidate, y the token that really follows, and V the vocabulary:

    kl             sum_i p_i (ln p_i - ln q_i), in nats; reverse_kl the same with p and q exchanged
    delta_p        q_y - p_y, as llama.cpp's `--kl-divergence` defines it
    nll            -ln q_y;  reference_nll: -ln p_y
    same_top1      the most likely tokens are the same
    top5           share of the reference's five most likely tokens among the candidate's five
    right          the most likely token is y; a *flip* is an answer that changes from right to wrong or
                   back (Dutta et al., "Accuracy is Not All You Need", arXiv:2407.09141)
    cosine         cosine of the two logit vectors, each less its own mean
    squared_error  mean over V of the squared difference of the two logit vectors, each less its own mean
    largest_error  the largest such difference

Logits are centred for the last three since adding a constant to a row changes no probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from vera_edge.arrays import Bool, Float32, Float64, Int64
from vera_edge.cores import available_cores
from vera_edge.divergence import expected, log_softmax
from vera_edge.errors import DataError, MismatchError

TOP_K = 5
# Logits handled at once, by each core: a block of float64 is then 1 MB, which caches hold.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class TokenMetrics:
    """One value per token, each of shape (n,); the module's docstring defines them.

    `reference_top1` and `top1` are the most likely tokens' ids.
    """

    kl: Float64
    reverse_kl: Float64
    delta_p: Float64
    reference_nll: Float64
    nll: Float64
    reference_top1: Int64
    top1: Int64
    top5: Float64
    reference_right: Bool
    right: Bool
    cosine: Float64
    squared_error: Float64
    largest_error: Float64

    @property
    def same_top1(self) -> Bool:
        return self.reference_top1 == self.top1

    def __len__(self) -> int:
        return len(self.kl)


@dataclass(frozen=True)
class _Scores:
    """What is needed of one model's logits, computed once however often they are compared."""

    log_p: Float64  # (n, vocab)
    p: Float64  # (n, vocab)
    mean: Float64  # (n,) of log_p
    variance: Float64  # (n,) of log_p
    top1: Int64  # (n,)
    top5: Int64  # (n, 5)

    @classmethod
    def of(cls, logits: Float32) -> _Scores:
        log_p = log_softmax(logits)
        mean = log_p.mean(axis=1)
        best = _best(logits)
        return cls(
            log_p,
            np.exp(log_p),
            mean,
            np.einsum("ij,ij->i", log_p, log_p) / log_p.shape[1] - mean**2,
            best[:, 0],
            best,
        )


def _best(logits: Float32) -> Int64:
    """The ids of the (at most) five largest logits of each row, best first: five argmax beat a partition."""
    left, rows = logits.copy(), np.arange(len(logits))
    found = np.empty((len(logits), min(TOP_K, logits.shape[1])), np.int64)
    for place in range(found.shape[1]):
        found[:, place] = left.argmax(axis=1)
        left[rows, found[:, place]] = -np.inf
    return found


def compare(reference: Float32, candidate: Float32, targets: Int64) -> TokenMetrics:
    """Compare logits (n, vocab) of two models at the same n positions; `targets` (n,) are the true tokens.

    Raises MismatchError when the shapes differ, DataError on logits that aren't finite.
    """
    return compare_all(reference, {"candidate": candidate}, targets)["candidate"]


def compare_all(
    reference: Float32, candidates: Mapping[str, Float32], targets: Int64
) -> dict[str, TokenMetrics]:
    """Compare several candidates with one reference, whose softmax is then computed once.

    reference and each candidate: (n, vocab) float32; targets: (n,) token ids. Memory beside the arguments
    is a few blocks of 1 MB for each core, or of one row where that is longer. Raises as `compare`.
    """
    _check(reference, candidates, targets)

    def compared(rows: slice) -> dict[str, TokenMetrics]:
        scores = _Scores.of(reference[rows])
        return {
            name: _compare_block(scores, _Scores.of(logits[rows]), targets[rows])
            for name, logits in candidates.items()
        }

    blocks = _blocks(reference)
    # numpy lets go of the interpreter, and no row asks for another.
    with ThreadPoolExecutor(min(available_cores(), len(blocks) or 1)) as pool:
        found = list(pool.map(compared, blocks))
    return {name: _concatenate([block[name] for block in found]) for name in candidates}


def _blocks(logits: Float32) -> list[slice]:
    """The rows of logits (n, vocab) that are handled at once."""
    count = max(1, _BLOCK // max(1, logits.shape[1]))
    return [slice(start, start + count) for start in range(0, len(logits), count)]


def _check(reference: Float32, candidates: Mapping[str, Float32], targets: Int64) -> None:
    if reference.ndim != 2 or targets.shape != reference.shape[:1]:
        raise MismatchError(
            f"logits of shape {list(reference.shape)} don't belong to {list(targets.shape)} target tokens"
        )
    for name, logits in {"reference": reference, **candidates}.items():
        if logits.shape != reference.shape:
            raise MismatchError(
                f"the {name} gives logits of shape {list(logits.shape)} and the reference "
                f"{list(reference.shape)}; compare models of one vocabulary"
            )
        if not all(np.isfinite(logits[rows]).all() for rows in _blocks(logits)):
            raise DataError(
                f"the {name}'s logits hold NaN or infinities; the model or its weights are broken"
            )
    if len(targets) and not (targets.min() >= 0 and targets.max() < reference.shape[1]):
        raise MismatchError(
            f"token {int(targets.max())} lies outside the model's vocabulary of {reference.shape[1]}; "
            "the tokenizer belongs to another model"
        )


def _compare_block(reference: _Scores, candidate: _Scores, targets: Int64) -> TokenMetrics:
    difference = candidate.log_p - reference.log_p  # ln q - ln p
    rows = np.arange(len(targets))
    shift = difference.mean(axis=1)
    squared = np.einsum("ij,ij->i", difference, difference) / difference.shape[1] - shift**2
    shared = (reference.top5[:, :, None] == candidate.top5[:, None, :]).any(axis=2)
    return TokenMetrics(
        kl=expected(reference.p, -difference),
        reverse_kl=expected(candidate.p, difference),
        delta_p=candidate.p[rows, targets] - reference.p[rows, targets],
        reference_nll=-reference.log_p[rows, targets],
        nll=-candidate.log_p[rows, targets],
        reference_top1=reference.top1,
        top1=candidate.top1,
        top5=shared.mean(axis=1),
        reference_right=reference.top1 == targets,
        right=candidate.top1 == targets,
        cosine=_centred_cosine(reference, candidate),
        squared_error=np.maximum(squared, 0.0),
        largest_error=np.maximum(difference.max(axis=1) - shift, shift - difference.min(axis=1)),
    )


def _centred_cosine(a: _Scores, b: _Scores) -> Float64:
    """Cosine of rows, each less its mean. Log-probabilities differ from logits by a constant: the same."""
    covariance = np.einsum("ij,ij->i", a.log_p, b.log_p) / a.log_p.shape[1] - a.mean * b.mean
    spread = np.sqrt(np.maximum(a.variance, 0.0) * np.maximum(b.variance, 0.0))
    # Two constant rows are both uniform, hence the same.
    cosine = np.ones(len(covariance))
    np.divide(covariance, spread, out=cosine, where=spread > 0)
    return np.clip(cosine, -1.0, 1.0)


def _concatenate(parts: list[TokenMetrics]) -> TokenMetrics:
    if not parts:
        raise DataError("there is no token to compare; give more text")
    return TokenMetrics(
        **{
            field.name: np.concatenate([getattr(p, field.name) for p in parts])
            for field in fields(TokenMetrics)
        }
    )
