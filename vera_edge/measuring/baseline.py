"""Holds a report to an earlier one of the same text: a new release must not drift further than the last.

Both were measured on the same tokens, so what differs between them is the artefacts, not the draw of text:
the figures are compared themselves, with a tolerance, not their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vera_edge.errors import MismatchError, PlanError
from vera_edge.measuring.result import FORMAT, DriftReport, Outcome
from vera_edge.storage.json_text import read_json

TOLERANCE = 0.1
_Figures = Mapping[str, Any]

# name -> (words, badness of a report's dict, smallest change that counts)
_FIGURES: Mapping[str, tuple[str, Callable[[_Figures], float], float]] = {
    "kl": ("mean KL", lambda r: r["fidelity"]["kl"]["mean"]["value"], 1e-6),
    "kl_p99": ("KL's 99 % quantile", lambda r: r["fidelity"]["kl"]["quantiles"]["p99"], 1e-5),
    "top1": ("top-1 disagreement", lambda r: 1.0 - r["fidelity"]["same_top1"]["value"], 1e-3),
    "flips": ("share of flips", lambda r: r["fidelity"]["flips"]["value"], 1e-3),
    "bytes": ("bytes on disk", lambda r: r["candidate"]["bytes"], 0.0),
}


def read(path: Path) -> dict[str, Any]:
    """An earlier report of a text model, as `vera-edge drift --json` printed it.

    Raises PlanError when it isn't one, or lacks something that is read of it later.
    """
    value = read_json(path, PlanError)
    try:
        if value["format"] != FORMAT:
            raise PlanError(f"{path} has report format {value['format']}, not {FORMAT}; measure it again")
        sound = all(_is_number(figure(value)) for _, figure, _ in _FIGURES.values())
        sound = sound and isinstance(value["candidate"]["name"], str)
        sound = sound and all(key in value["text"] for key in ("sha256", "tokens", "window", "source"))
        if not sound:
            raise ValueError("a figure that is none")
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{path} isn't a report that `vera-edge drift --json` printed") from None
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def hold(report: DriftReport, earlier: Mapping[str, Any]) -> DriftReport:
    """`report` with an Outcome for each figure: broken when it is more than 10 % worse than `earlier`.

    Raises MismatchError when the two were measured on different tokens.
    """
    now = report.to_dict()
    if any(now["text"][key] != earlier["text"][key] for key in ("sha256", "tokens", "window")):
        before = earlier["text"]
        raise MismatchError(
            f"the baseline was measured on {before['tokens']} tokens of {before.get('source')}, this report "
            f"on {report.text.tokens} of {report.text.source}; measure both on the same text"
        )
    outcomes = []
    for name, (words, figure, floor) in _FIGURES.items():
        before, after = float(figure(earlier)), float(figure(now))
        bound = before * (1.0 + TOLERANCE) + floor
        state = "kept" if after <= bound else "broken"
        sentence = f"{words} is {after:.4g}, in the baseline {before:.4g}, at most {bound:.4g}: {state}"
        outcomes.append(Outcome(f"baseline_{name}", bound, after, None, None, state, sentence))
    return replace(report, outcomes=report.outcomes + tuple(outcomes))
