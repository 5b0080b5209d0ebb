"""The report as one HTML file: no network, no script, light and dark, readable on a phone and on paper.

The whole report is in the file as JSON too (element `report`), and every figure that is shown names the path
of its value there, so that what is read and what a pipeline reads can be held against each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vera_edge.measuring import charts
from vera_edge.measuring.result import DriftReport, Generations

_WORST_LAYERS = 12
_SHOWN_WORST = 12


def render(report: DriftReport, beside: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """`report` as UTF-8 HTML; `beside` are other reports' dicts to plot size against drift with."""
    value = report.to_dict()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["figure"] = lambda path, form: _figure(value, path, form)
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:.1f} MB"
    environment.filters["visible"] = lambda text: text.replace("\n", "↵").replace("\t", "⇥")
    page = environment.get_template("report.html.j2").render(
        report=report,
        charts={name: Markup(text) for name, text in _charts(report, beside).items()},
        layers=charts.ranked(report, _WORST_LAYERS),
        worst=report.worst[:_SHOWN_WORST],
        samples=[_marked(sample) for sample in report.generations],
        theirs=value["llama.cpp"],
        data=Markup(json.dumps(value, allow_nan=False, sort_keys=True).replace("<", "\\u003c")),
        bar=_bar(report),
    )
    return page.encode(errors="backslashreplace")  # a folder's name may be no UTF-8


def _charts(report: DriftReport, beside: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        "histogram": charts.kl_histogram(report),
        "position": charts.kl_by_position(report),
        "layers": charts.layer_map(report),
        "size": charts.size_against_drift(charts.points(report, beside)),
    }


def _figure(value: Mapping[str, Any], path: str, form: str) -> Markup:
    """The value at `path` of the report, formatted, in an element that names both."""
    found: Any = value
    for part in path.split("/"):
        found = found[part]
    return Markup('<span data-figure="{}" data-form="{}">{}</span>').format(path, form, format(found, form))


def _marked(sample: Generations) -> dict[str, Any]:
    """A pair of continuations cut where they part: what is the same, then what each goes on with."""
    return {
        "prompt": sample.prompt,
        "same": "".join(sample.reference[: sample.same]),
        "reference": "".join(sample.reference[sample.same :]),
        "candidate": "".join(sample.candidate[sample.same :]),
        "count": sample.same,
        "of": len(sample.reference),
    }


def _bar(report: DriftReport) -> float | None:
    """Retained effect as a share of the bar's width, per cent."""
    return None if report.retained is None else 100.0 * min(max(report.retained.value, 0.0), 1.0)
