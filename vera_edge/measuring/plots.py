"""The report's plots as PNG, for slides and model cards. Needs matplotlib (extra: report)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vera_edge.measuring import charts
from vera_edge.measuring.comparison import HISTOGRAM_EDGES
from vera_edge.measuring.result import DriftReport

_COLOURS = {"fidelity": "#1f6feb", "effect": "#c2571a", "noise": "#8b949e"}
_WORST_LAYERS = 20


def render(report: DriftReport, beside: Sequence[Mapping[str, Any]] = ()) -> dict[str, bytes]:
    """File name -> PNG, 1600 x 1000 pixels; a plot without data is left out. No display is needed."""
    # Not as a matplotlibrc in the working folder says, which may be an artefact's: it can ask for LaTeX. And
    # no name is a formula.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "text.parse_math": False}):
        figures = {
            "kl_histogram.png": _histogram(report),
            "kl_by_position.png": _positions(report),
            "layers.png": _layers(report),
            "size_against_drift.png": _sizes(report, beside),
        }
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _blank(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    return figure, axes


def _histogram(report: DriftReport) -> Figure:
    figure, axes = _blank(
        f"KL divergence of tokens: {report.candidate.name}", "KL of a token, nats", "share of tokens"
    )
    for name, comparison in charts.series(report).items():
        shares = [count / comparison.tokens for count in comparison.kl_histogram[1:-1]]
        axes.stairs(
            shares, HISTOGRAM_EDGES, fill=name == "fidelity", color=_COLOURS[name], alpha=0.7, label=name
        )
    axes.set_xscale("log")
    axes.legend()
    return figure


def _positions(report: DriftReport) -> Figure:
    figure, axes = _blank("Mean KL along the window", "position, tokens", "mean KL, nats")
    for name, comparison in charts.series(report).items():
        if name != "noise":
            points = charts.binned(comparison.kl_by_position)
            axes.plot(*zip(*points, strict=True), color=_COLOURS[name], label=name)
    axes.set_yscale("log", nonpositive="clip")
    axes.legend()
    return figure


def _layers(report: DriftReport) -> Figure | None:
    ranked = charts.ranked(report, _WORST_LAYERS)
    if not ranked:
        return None
    figure, axes = _blank("The layers that drift most", "mean KL when taken alone, nats", "")
    axes.barh([layer.module for layer in ranked], [charts.layer_figure(layer) or 0.0 for layer in ranked])
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _sizes(report: DriftReport, beside: Sequence[Mapping[str, Any]]) -> Figure | None:
    points = charts.points(report, beside)
    if len(points) < 2:
        return None
    figure, axes = _blank("Size against drift", "size on disk, MB", "mean KL, nats")
    for name, size, kl in points:
        axes.plot(size / 1e6, kl, "o")
        axes.annotate(name, (size / 1e6, kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without the version in its metadata the same report gives the same bytes from release to release.
    with matplotlib.rc_context({"svg.hashsalt": "vera-edge"}):
        figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()
