"""The report's charts, each from the report's data to one SVG; an empty string where there is no data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vera_edge.measuring import svg
from vera_edge.measuring.comparison import HISTOGRAM_EDGES, Comparison
from vera_edge.measuring.result import DriftReport, LayerDrift

_SHOWN_POSITIONS = 48
_CELL_ROWS = re.compile(r"^(?P<before>.*?\.)?(?P<index>\d+)\.(?P<kind>.+)$")


def kl_histogram(report: DriftReport) -> str:
    """Share of tokens by KL, fidelity filled and effect as an outline, on a logarithmic axis."""
    shares = {name: _shares(comparison) for name, comparison in series(report).items()}
    used = [i for i in range(len(HISTOGRAM_EDGES) - 1) if any(share[i] > 0 for share in shares.values())]
    if not used:
        return ""
    first, last = used[0], used[-1] + 1
    edges = HISTOGRAM_EDGES[first : last + 1]
    cut = {name: share[first:last] for name, share in shares.items()}
    top = max(max(share) for share in cut.values())
    chart = svg.Chart(
        "Share of tokens by KL divergence", (edges[0], edges[-1]), (0.0, top * 1.05), log_x=True
    )
    chart.grid("KL divergence of a token, nats", "share of tokens", percent=True)
    for name, share in cut.items():
        chart.steps(name, edges, share, filled=name == "fidelity")
    return chart.render()


def series(report: DriftReport) -> dict[str, Comparison]:
    """The comparisons that a report has, by name."""
    found = {"fidelity": report.fidelity, "effect": report.effect, "noise": report.noise}
    return {name: comparison for name, comparison in found.items() if comparison is not None}


def _shares(comparison: Comparison) -> list[float]:
    return [count / comparison.tokens for count in comparison.kl_histogram[1:-1]]


def kl_by_position(report: DriftReport) -> str:
    """Mean KL by position in the window: drift that grows with context shows here."""
    lines = {}
    for name, comparison in series(report).items():
        if name == "noise":
            continue  # from a few windows only, it would be too ragged to read
        stretches = binned(comparison.kl_by_position)
        if len(stretches) > 1:
            lines[name] = stretches
    if not lines:
        return ""
    values = [value for line in lines.values() for _, value in line if value > 0]
    if not values:
        return ""
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    end = max(line[-1][0] for line in lines.values())
    chart = svg.Chart("Mean KL by position", (0.0, end), (low, high if high > low else low * 10), log_y=True)
    chart.grid("position in the window, tokens", "mean KL, nats")
    for name, line in lines.items():
        chart.line(name, line)
    return chart.render()


def binned(values: Sequence[float]) -> list[tuple[float, float]]:
    """(position, mean) of at most 48 stretches of the window."""
    size = max(1, math.ceil(len(values) / _SHOWN_POSITIONS))
    bins = [values[at : at + size] for at in range(0, len(values), size)]
    return [(index * size + (len(part) + 1) / 2, sum(part) / len(part)) for index, part in enumerate(bins)]


def layer_map(report: DriftReport) -> str:
    """Every linear layer as a cell: columns are blocks, rows kinds of layer, darker drifts more."""
    figures = {layer.module: figure for layer in report.layers if (figure := layer_figure(layer)) is not None}
    cells = {module: match for module in figures if (match := _CELL_ROWS.match(module))}
    if not cells or not any(figures.values()):
        return ""
    kinds = list(dict.fromkeys(match["kind"] for match in cells.values()))
    columns = max(int(match["index"]) for match in cells.values()) + 1
    left, top = 104.0, 8.0
    size = min((svg.WIDTH - left - 6) / columns, 22.0)
    shades = _shades(figures)
    marks = []
    for module, match in cells.items():
        x, y = left + int(match["index"]) * size, top + kinds.index(match["kind"]) * 22.0
        title = f"<title>{escape(module)}: {figures[module]:.3g}</title>"
        marks.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="21" '
            f'fill-opacity="{shades[module]:.2f}">{title}</rect>'
        )
    for row, kind in enumerate(kinds):
        short, y = escape(kind.rsplit(".", 1)[-1]), top + row * 22 + 15
        marks.append(f'<text class="label" x="{left - 6}" y="{y:.0f}" text-anchor="end">{short}</text>')
    height = top + len(kinds) * 22.0
    for index in range(0, columns, max(1, columns // 8)):
        x = left + (index + 0.5) * size
        marks.append(
            f'<text class="label" x="{x:.1f}" y="{height + 16:.0f}" text-anchor="middle">{index}</text>'
        )
    return svg.svg("Drift by layer", height + 22, marks)


def layer_figure(layer: LayerDrift) -> float | None:
    """What a layer is ranked by: its own KL where it was measured, else its error relative to the delta."""
    if layer.kl is not None:
        return layer.kl
    return layer.delta_error if layer.delta_error is not None else layer.weight_error


def ranked(report: DriftReport, count: int) -> list[LayerDrift]:
    """The `count` layers that drift most."""
    return sorted(report.layers, key=lambda layer: -(layer_figure(layer) or 0.0))[:count]


_LEAST = 1e-30  # nats; less has no place on a logarithmic axis


def points(report: DriftReport, beside: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """(name, bytes, mean KL) of the report's artefact and of other reports' (dicts)."""
    found = [(report.candidate.name, report.candidate.bytes, report.fidelity.kl.mean.value)]
    return found + [
        (r["candidate"]["name"], r["candidate"]["bytes"], r["fidelity"]["kl"]["mean"]["value"])
        for r in beside
    ]


def _shades(figures: Mapping[str, float]) -> dict[str, float]:
    """Opacity 0.08 to 1 by the logarithm over the largest three decades."""
    top = math.log10(max(figures.values()))
    return {
        module: 0.08 + 0.92 * max(0.0, 1 - (top - math.log10(value)) / 3) if value > 0 else 0.08
        for module, value in figures.items()
    }


def size_against_drift(artefacts: Sequence[tuple[str, int, float]]) -> str:
    """Several artefacts (name, bytes, mean KL): down and left is better. The first is the report's own."""
    shown = [(name, size, kl) for name, size, kl in artefacts if kl > _LEAST and size > 0]
    if len(shown) < 2:
        return ""
    sizes, kls = [size / 1e6 for _, size, _ in shown], [kl for _, _, kl in shown]
    low, high = 10 ** math.floor(math.log10(min(kls))), 10 ** math.ceil(math.log10(max(kls)) + 0.05)
    chart = svg.Chart(
        "Size against drift", (0.0, max(sizes) * 1.15), (low, high if high > low else low * 10), log_y=True
    )
    chart.grid("size on disk, MB", "mean KL, nats")
    for index, ((name, _, kl), size) in enumerate(zip(shown, sizes, strict=True)):
        chart.dot("fidelity" if index == 0 else "noise", size, kl, f"{name}: {size:.1f} MB, {kl:.3g} nats")
        right = chart.x(size) < svg.WIDTH * 0.7
        chart.text(chart.x(size) + (9 if right else -9), chart.y(kl) - 6, name, "start" if right else "end")
    return chart.render()
