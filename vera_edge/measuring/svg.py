"""Small charts as inline SVG: no script, no dependency, colours from the page's style sheet.

A chart is drawn on a canvas of 440 x 250 units and scales with its column, so that its text stays legible
from a phone to paper. Marks carry a <title>, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 40.0
# What the report's style sheet says, for a chart that stands alone.
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}.grid{stroke:#d8dee4}.axis{stroke:#57606a}"
    ".line,.area{fill:none;stroke-width:2}.area{fill-opacity:.25}"
    ".fidelity{stroke:#1f6feb}.area.fidelity,.dot.fidelity{fill:#1f6feb}"
    ".effect{stroke:#c2571a}.noise{stroke:#8b949e;stroke-dasharray:4 3}"
)


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto pixels `start` to `end`, evenly or by decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self._warp(self.low), self._warp(self.high)
        share = (self._warp(min(max(value, self.low), self.high)) - low) / ((high - low) or 1.0)
        return self.start + share * (self.end - self.start)

    def _warp(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Decades, at most about seven, or four to eight round steps."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first + 5) // 6))]
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


class Chart:
    """A canvas with two axes; marks are added in drawing order, `render` makes the <svg>."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self.title = title
        self.x = Axis(*x, _LEFT, WIDTH - _RIGHT, log_x)
        self.y = Axis(*y, HEIGHT - _BOTTOM, _TOP, log_y)
        self._marks: list[str] = []

    def grid(self, x_label: str, y_label: str, *, percent: bool = False) -> None:
        """Grid lines, tick labels and the axes' names."""
        left, right, bottom = self.x.start, self.x.end, self.y.start
        for value in self.y.ticks():
            at = self.y(value)
            self._marks.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
            text = f"{value:.0%}" if percent and value >= 0.01 else number(value)
            self.text(left - 6, at + 4, text, anchor="end")
        for value in self.x.ticks():
            self.text(self.x(value), bottom + 16, number(value), anchor="middle")
        self._marks.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        self.text((left + right) / 2, HEIGHT - 6, x_label, anchor="middle")
        self._marks.append(
            f'<text class="label" text-anchor="middle" transform="translate(11 {(bottom + _TOP) / 2:.0f}) '
            f'rotate(-90)">{escape(y_label)}</text>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> None:
        """Words at a place of the canvas; `kind`: their CSS class."""
        self._marks.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(self, series: str, points: Sequence[tuple[float, float]]) -> None:
        """A line through points in data units, in the colour of the CSS class `series`."""
        path = "L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in points)
        self._marks.append(f'<path class="line {series}" d="M{path}"/>')

    def steps(self, series: str, edges: Sequence[float], heights: Sequence[float], filled: bool) -> None:
        """A histogram's outline, filled or not: heights[i] between edges[i] and edges[i + 1]."""
        bottom = self.y.start
        path = f"M{self.x(edges[0]):.1f} {bottom:.1f}"
        for index, height in enumerate(heights):
            path += f"V{self.y(height):.1f}H{self.x(edges[index + 1]):.1f}"
        kind = "area" if filled else "line"
        self._marks.append(f'<path class="{kind} {series}" d="{path}V{bottom:.1f}"/>')

    def dot(self, series: str, x: float, y: float, title: str) -> None:
        self._marks.append(
            f'<circle class="dot {series}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="5">'
            f"<title>{escape(title)}</title></circle>"
        )

    def render(self) -> str:
        return svg(self.title, HEIGHT, self._marks)


def svg(title: str, height: float, marks: Sequence[str]) -> str:
    """An <svg> of the common width holding `marks`."""
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}</svg>"
    )


def as_file(chart: str) -> bytes:
    """A chart as a file of its own, for pages that show it as an image; empty for an empty chart."""
    style = f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    head, mark, rest = chart.partition(">")
    named = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}{mark}{style}{rest}\n".encode() if chart else b""


def number(value: float) -> str:
    """A tick's text: powers of ten as such, everything else short."""
    if value == 0:
        return "0"
    exponent = math.log10(abs(value))
    if abs(exponent - round(exponent)) < 1e-9 and not -3 <= exponent <= 3:
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}"
