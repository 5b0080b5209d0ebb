"""The files that a report is written to: HTML, JUnit XML, PNG plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vera_edge.errors import OutputError
from vera_edge.measuring import html, junit
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport
from vera_edge.storage.files import write_atomic

# Prompts that both models continue for the HTML report.
SAMPLES = 3


def check(report: Path | None, junit_file: Path | None, plots: Path | None) -> None:
    """Raise OutputError for what can't be written, before anything is measured."""
    for path in (report, junit_file):
        if path is not None and path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file to write")
    if plots is not None:
        if plots.exists() and not plots.is_dir():
            raise OutputError(f"{plots} is a file; give the name of a folder for the plots")
        import matplotlib  # noqa: F401  (a missing extra is told before the long work, not after)


def write(
    found: DriftReport | EncoderReport,
    report: Path | None,
    junit_file: Path | None,
    plots: Path | None,
    beside: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write what was asked for, each file whole or not at all; an earlier one is replaced.

    beside: other reports' dicts, to plot size against drift with. HTML and plots are of text models only.
    """
    if junit_file is not None:
        write_atomic(junit_file, junit.render(found))
    if isinstance(found, EncoderReport):
        return
    if report is not None:
        write_atomic(report, html.render(found, beside))
    if plots is not None:
        from vera_edge.measuring import plots as drawing

        for name, png in drawing.render(found, beside).items():
            write_atomic(plots / name, png)
