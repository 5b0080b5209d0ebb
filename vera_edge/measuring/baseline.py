"""Holds a report to an earlier one of the same text: a new release must not drift further than the last.

Both were measured on the same tokens, so what differs between them is the artefacts, not the draw of text:
the figures are compared themselves, with a tolerance, not their intervals.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vera_edge.errors import MismatchError, PlanError
from vera_edge.measuring.result import FORMAT, DriftReport, Outcome
from vera_edge.storage.json_text import read_json

TOLERANCE = 0.1
_Figures = Mapping[str, Any]

_MOST_BYTES = 64 << 20  # of a report's file; real ones have some hundred KB
_LONGEST = 1000  # characters of a name
_NOT_SHOWN = frozenset({"Cc", "Cs", "Cn", "Zl", "Zp"})  # control characters, halves of pairs, and their like
_MOST_NATS = 1e6
_SHARE = 1.0

# name -> (words, badness of a report's dict, smallest change that counts, the largest that a report can have)
_FIGURES: Mapping[str, tuple[str, Callable[[_Figures], Any], float, float]] = {
    "kl": ("mean KL", lambda r: r["fidelity"]["kl"]["mean"]["value"], 1e-6, _MOST_NATS),
    "kl_p99": ("KL's 99 % quantile", lambda r: r["fidelity"]["kl"]["quantiles"]["p99"], 1e-5, _MOST_NATS),
    "top1": ("top-1 disagreement", lambda r: 1.0 - r["fidelity"]["same_top1"]["value"], 1e-3, _SHARE),
    "flips": ("share of flips", lambda r: r["fidelity"]["flips"]["value"], 1e-3, _SHARE),
    "bytes": ("bytes on disk", lambda r: r["candidate"]["bytes"], 0.0, 2.0**63),
}


def read(path: Path) -> dict[str, Any]:
    """An earlier report of a text model, as `vera-edge drift --json` printed it.

    Raises PlanError when it isn't one, or lacks something that is read of it later.
    """
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise PlanError(f"{path} is larger than any report that `vera-edge drift --json` prints")
    value = read_json(path, PlanError)
    found = value.get("format")
    if type(found) is int and found != FORMAT and abs(found) < 1000:
        raise PlanError(f"{path} has report format {found}, not {FORMAT}; measure it again")
    try:
        sound = value["format"] == FORMAT and _is_whole(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise PlanError(f"{path} isn't a report that `vera-edge drift --json` printed")
    return value


def _is_whole(value: _Figures) -> bool:
    """Whether all that is read of a report is there, of its type and of a size that can be drawn."""
    figures = ((figure(value), largest) for _, figure, _, largest in _FIGURES.values())
    text = value["text"]
    return (
        all(type(found) in (int, float) and -1e-9 <= found <= largest for found, largest in figures)
        and all(_is_name(one) for one in (value["candidate"]["name"], text["sha256"], text["source"]))
        and all(type(text[key]) is int for key in ("tokens", "window"))
    )


def _is_name(value: object) -> bool:
    """Whether it is text that a page can show."""
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST
        and not any(unicodedata.category(mark) in _NOT_SHOWN for mark in value)
    )


def hold(report: DriftReport, earlier: Mapping[str, Any]) -> DriftReport:
    """`report` with an Outcome for each figure: broken when it is more than 10 % worse than `earlier`.

    Raises MismatchError when the two were measured on different tokens.
    """
    now = report.to_dict()
    if any(now["text"][key] != earlier["text"][key] for key in ("sha256", "tokens", "window")):
        before = earlier["text"]
        raise MismatchError(
            f"the baseline was measured on {before['tokens']} tokens of {before['source']}, this report "
            f"on {report.text.tokens} of {report.text.source}; measure both on the same text"
        )
    outcomes = []
    for name, (words, figure, floor, _) in _FIGURES.items():
        before, after = float(figure(earlier)), float(figure(now))
        bound = before * (1.0 + TOLERANCE) + floor
        state = "kept" if after <= bound else "broken"
        sentence = f"{words} is {after:.4g}, in the baseline {before:.4g}, at most {bound:.4g}: {state}"
        outcomes.append(Outcome(f"baseline_{name}", bound, after, None, None, state, sentence))
    return replace(report, outcomes=report.outcomes + tuple(outcomes))
