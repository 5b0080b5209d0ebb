"""The same figures under the names that llama.cpp's `llama-perplexity --kl-divergence` prints.

Same formulas (tools/perplexity/perplexity.cpp), so that a table of ours can stand beside one of theirs. Two
things differ in how they are measured: llama.cpp scores only the second half of each window, and keeps the
reference's log-probabilities as 16-bit integers, which shows as negative divergences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vera_edge.measuring.comparison import Comparison, Distribution, Interval

_KLD = {
    "99.9%": "p99.9", "99.0%": "p99", "95.0%": "p95", "90.0%": "p90", "Median": "median",
    "10.0%": "p10", "5.0%": "p5", "1.0%": "p1", "0.1%": "p0.1",
}  # fmt: skip
_DELTA_P = {
    "99.9%": "p99.9", "99.0%": "p99", "95.0%": "p95", "90.0%": "p90", "75.0%": "p75", "Median": "median",
    "25.0%": "p25", "10.0%": "p10", "5.0%": "p5", "1.0%": "p1", "0.1%": "p0.1",
}  # fmt: skip


def statistics(found: Comparison) -> dict[str, tuple[float, float | None]]:
    """llama.cpp's name -> (value, its ± or None). KLD in nats; Δp and "Same top p" in per cent."""
    return {
        "Mean PPL(Q)": _pair(found.perplexity),
        "Mean PPL(base)": _pair(found.reference_perplexity),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100.0 * found.log_perplexity_correlation, None),
        "Mean ln(PPL(Q)/PPL(base))": _pair(found.log_perplexity_ratio),
        "Mean PPL(Q)/PPL(base)": _pair(found.perplexity_ratio),
        "Mean PPL(Q)-PPL(base)": _pair(found.perplexity_difference),
        **dict(_spread("KLD", found.kl, _KLD, 1.0)),
        **dict(_spread("Δp", found.delta_p, _DELTA_P, 100.0)),
        "RMS Δp": _pair(found.delta_p_rms, 100.0),
        "Same top p": _pair(found.same_top1, 100.0),
    }


def _pair(estimate: Interval, scale: float = 1.0) -> tuple[float, float | None]:
    return scale * estimate.value, scale * estimate.standard_error


def _spread(
    name: str, found: Distribution, quantiles: Mapping[str, str], scale: float
) -> Iterator[tuple[str, tuple[float, float | None]]]:
    yield f"Mean {name}", _pair(found.mean, scale)
    yield f"Maximum {name}", (scale * found.maximum, None)
    for theirs, ours in quantiles.items():
        yield f"{theirs} {name}", (scale * found.quantiles[ours], None)
    yield f"Minimum {name}", (scale * found.minimum, None)
