"""The HTML report: self-contained, safe, and its figures are those of its JSON."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.unit.measuring.test_limits import make_report
from vera_edge.measuring import html, limits, plots, svg
from vera_edge.measuring.result import DriftReport, Generations, LayerDrift, WorstText

VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Page(HTMLParser):
    """Collects figures, text, attributes and the tree's balance."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.data = "", ""
        self.tags: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.decode())
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.data += data
            return
        self.text += data
        if "data-figure" in attributes:
            self.figures.append((str(attributes["data-figure"]), str(attributes["data-form"]), data))


def _full_report() -> DriftReport:
    report = limits.hold(make_report(), {"max_kl": 1e-9, "min_retained": 0.5})
    return replace(
        report,
        noise=report.fidelity,
        notes=("projections: drawn from <seed>",),
        worst=(WorstText("for i in\n", " range", " <b>one</b>", "</script><script>alert(1)</script>", 3.5),),
        generations=(Generations("Say:", (" a", " b", " c"), (" a", " x", " y"), 1),),
        layers=tuple(
            LayerDrift(f"model.layers.{index}.mlp.{kind}", 10, 0.01, 0.5, 0.97, 31.0, 0.001 * (index + 1))
            for index in range(3)
            for kind in ("up_proj", "down_proj")
        ),
    )


@pytest.fixture(scope="module")
def page() -> _Page:
    report = _full_report()
    beside = {**report.to_dict(), "candidate": {"name": "other", "bytes": 4000}}
    return _Page(html.render(report, [beside]))


def test_every_figure_on_the_page_is_the_json_value_it_names(page: _Page) -> None:
    report: Any = json.loads(page.data)
    assert len(page.figures) > 50
    for path, form, shown in page.figures:
        value = report
        for part in path.split("/"):
            value = value[part]
        assert format(value, form) == shown, path


def test_the_json_in_the_page_is_the_report(page: _Page) -> None:
    assert json.loads(page.data) == json.loads(json.dumps(_full_report().to_dict()))


def test_the_page_needs_no_network_and_runs_no_script(page: _Page) -> None:
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "onload", "onclick"), (tag, name)
        if name == "href":
            assert value.startswith("data:")
        assert "http:" not in value and "https:" not in value
    scripts = [value for tag, name, value in page.attributes if tag == "script" and name == "type"]
    assert page.tags.count("script") == 1 and scripts == ["application/json"]
    policy = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy and policy[0].startswith("default-src 'none'")


def test_text_from_models_is_shown_and_never_becomes_markup(page: _Page) -> None:
    assert "</script><script>alert(1)</script>" in page.text
    assert "<b>one</b>" in page.text and page.tags.count("b") == 1  # the verdict's own
    assert "for i in↵" in page.text  # a line break among the worst tokens is drawn as a mark
    assert "drawn from <seed>" in page.text


def test_the_verdict_comes_first_and_every_part_is_there(page: _Page) -> None:
    order = [
        "The adapter is", "Retained effect", "Limits: not kept", "How many tokens drift how far",
        "Drift along the window", "Size against drift", "Drift by layer", "Figures",
        "The layers that drift most", "The same prompts, continued by both",
        "Where they differ most", "The same under llama.cpp's names",
    ]  # fmt: skip
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    assert page.tags.count("svg") == 4


def test_continuations_are_marked_from_where_they_part(page: _Page) -> None:
    assert "artefact, 1 of 3 tokens the same" in page.text


def test_a_report_without_an_adapter_has_no_retained_effect() -> None:
    report = make_report(adapter=False)
    text = _Page(html.render(report)).text
    assert "Retained effect" not in text and "Fidelity" in text and "Size against drift" not in text


def test_an_artefact_without_any_drift_still_has_a_report() -> None:
    text = _Page(html.render(make_report(share=0.0))).text
    assert "The adapter is kept" in text


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html.render(_full_report()) == html.render(_full_report())


def test_charts_are_well_formed_and_within_their_canvas() -> None:
    rendered = html.render(_full_report()).decode()
    for drawing in re.findall(r"<svg.*?</svg>", rendered, re.DOTALL):
        root = ET.fromstring(drawing)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        assert root.attrib["aria-label"]
        for mark in root.iter():
            for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if name in mark.attrib:
                    assert -1 <= float(mark.attrib[name]) <= limit + 1
        assert "nan" not in drawing and "inf" not in drawing


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 256.0, False, [0.0, 100.0, 200.0]),
        (0.001, 1.0, True, [0.001, 0.01, 0.1, 1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert svg.Axis(low, high, 0, 100, log).ticks() == pytest.approx(expected)


def test_axes_map_ends_to_ends() -> None:
    axis = svg.Axis(1e-6, 1.0, 50, 450, True)
    assert axis(1e-6) == 50 and axis(1.0) == 450 and axis(1e-3) == pytest.approx(250)
    assert axis(0.0) == 50  # zero has no place on a logarithmic axis and goes to its edge


def test_png_plots() -> None:
    report = _full_report()
    beside = {**report.to_dict(), "candidate": {"name": "other", "bytes": 4000}}
    found = plots.render(report, [beside])
    assert set(found) == {"kl_histogram.png", "kl_by_position.png", "layers.png", "size_against_drift.png"}
    for png in found.values():
        assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == 1600
    assert set(plots.render(make_report())) == {"kl_histogram.png", "kl_by_position.png"}


def test_plots_are_not_drawn_as_a_folder_says(tmp_path: Path) -> None:
    """matplotlib reads a matplotlibrc from where one stands, which may ask for LaTeX."""
    import matplotlib

    report = make_report()
    truth = plots.render(report)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 20\naxes.grid: False\n")
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        assert plots.render(report) == truth
