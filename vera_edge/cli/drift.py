"""`vera-edge drift`: parse, measure, hold to limits, show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

import vera_edge
from vera_edge.api.drift import raise_when_exceeded
from vera_edge.cli import show

if TYPE_CHECKING:
    from vera_edge.api.drift import Comparison, DriftReport, EncoderReport, Interval

_STATES = {"kept": "green", "broken": "red", "undecided": "yellow"}
# Options of what is made of a single artefact.
_OF_ONE = ("by_layer", "baseline", "report", "beside", "junit_file", "plots")
_LEVELS = {"faithful": "green", "degraded": "yellow", "lost": "red", "undecided": "yellow"}


# What a person reads first; --json and --report have the rest.
_ROWS: tuple[tuple[str, Callable[[Comparison], str]], ...] = (
    ("mean KL, nats", lambda c: f"{c.kl.mean.value:.4g}"),
    ("  95 % interval", lambda c: _interval(c.kl.mean)),
    ("median KL", lambda c: f"{c.kl.quantiles['median']:.4g}"),
    ("99 % KL", lambda c: f"{c.kl.quantiles['p99']:.4g}"),
    ("largest KL", lambda c: f"{c.kl.maximum:.4g}"),
    ("top-1 agreement", lambda c: f"{c.same_top1.value:.4f}"),
    ("  95 % interval", lambda c: _interval(c.same_top1)),
    ("top-5 agreement", lambda c: f"{c.top5.value:.4f}"),
    ("right to wrong", lambda c: f"{c.right_to_wrong.value:.4f}"),
    ("wrong to right", lambda c: f"{c.wrong_to_right.value:.4f}"),
    ("perplexity", lambda c: f"{c.perplexity.value:.5g}"),
    ("  of the reference", lambda c: f"{c.reference_perplexity.value:.5g}"),
    ("  ratio", lambda c: f"{c.perplexity_ratio.value:.5g} ± {c.perplexity_ratio.standard_error:.2g}"),
)


def _interval(estimate: Interval) -> str:
    return f"{estimate.low:.3g} to {estimate.high:.3g}"


@click.command()
@click.argument("reference", type=show.FOLDER)
@click.argument("artefacts", metavar="ARTEFACT...", nargs=-1, required=True, type=show.FOLDER)
@click.option("--data", default="built-in", show_default=True, help="A UTF-8 text file, or built-in.")
@click.option("--base", type=show.FOLDER, help="The base, when REFERENCE is an adapter that doesn't find it.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    callback=show.weighted_paths,
    metavar="PATH=WEIGHT",
    help="An adapter of the reference, and what scales its delta, when REFERENCE is a base; repeat for more.",
)
@show.projection_rounding_option
@show.trained_as_option
@show.tokenizer_option
@click.option("--tokens", default=8192, show_default=True, help="About how many tokens to measure on.")
@click.option("--window", default=256, show_default=True, help="Tokens a window.")
@click.option("--exact", is_flag=True, help="Run a bitsandbytes artefact on exact values, not its kernels.")
@click.option("--by-layer", is_flag=True, help="Say which layer drifts (artefacts with readable weights).")
@click.option("--max-kl", type=float, help="Limit: mean KL divergence in nats.")
@click.option("--min-top1", type=float, help="Limit: top-1 agreement, 0 to 1.")
@click.option("--max-flips", type=float, help="Limit: share of answers that flip, 0 to 1.")
@click.option("--min-retained", type=float, help="Limit: retained effect; 0.5 unless given.")
@click.option("--limits", "limits_file", type=show.FOLDER, help="A TOML file with a [limits] table.")
@click.option(
    "--baseline", type=show.FOLDER, help="An earlier report's JSON that this one must not fall behind."
)
@click.option("--report", type=show.FOLDER, help="Write an HTML report to this file.")
@click.option(
    "--beside", multiple=True, type=show.FOLDER, help="Another report's JSON to plot beside; repeat for more."
)
@click.option("--junit", "junit_file", type=show.FOLDER, help="Write the limits as JUnit XML to this file.")
@click.option("--plots", type=show.FOLDER, help="Write PNG plots to this folder (extra: report).")
@click.option(
    "--max-memory", metavar="SIZE", help="Run models and exports of over half of it, like 6GB, by layer."
)
@click.option("--engine", default="local", show_default=True, help="local, or ray: a task an artefact.")
@click.option("--ray-address", metavar="ADDRESS", help="Of the Ray cluster; without one, this machine's.")
@show.json_option
@show.quiet_option
def drift(
    reference: Path,
    artefacts: tuple[Path, ...],
    data: str,
    base: Path | None,
    adapters: list[tuple[Path, float]],
    projection_rounding: str | None,
    trained_as: str | None,
    tokenizer: Path | None,
    tokens: int,
    window: int,
    exact: bool,
    by_layer: bool,
    limits_file: Path | None,
    baseline: Path | None,
    report: Path | None,
    beside: tuple[Path, ...],
    junit_file: Path | None,
    plots: Path | None,
    max_memory: str | None,
    engine: str,
    ray_address: str | None,
    as_json: bool,
    quiet: bool,
    **limits: float | None,
) -> None:
    """Measure how far ARTEFACT is from the model as trained, or each of several.

    REFERENCE is the adapter's folder, a base folder with --adapter, or a branch export that holds the values
    of the model as trained exactly: with fp32 weights, or those of an NF4 or FP4 base as they are.
    Fidelity is the KL divergence from the reference to the artefact, effect the one from the reference to the
    base without the adapter: an artefact whose fidelity isn't far below the effect has lost the adapter.

    Exit code 3 when a limit is broken or can't be decided.
    """
    asked: dict[str, Any] = {
        "data": data,
        "base": base,
        "adapter": adapters,
        "projection_rounding": projection_rounding,
        "trained_as": trained_as,
        "tokenizer": tokenizer,
        "tokens": tokens,
        "window": window,
        "exact": exact,
        "limits": limits_file,
        "max_memory": max_memory,
        **limits,
    }
    if len(artefacts) > 1 or engine != "local" or ray_address is not None:
        if option := show.given_on_line(*_OF_ONE):
            raise click.UsageError(f"{option} is for one artefact, in this process; measure it alone")
        asked |= {"engine": engine, "ray_address": ray_address}
        with show.progress_bar(quiet) as progress:
            reports = vera_edge.drift_each(reference, artefacts, progress=progress, **asked)
        if as_json:
            show.print_json([report.to_dict() for report in reports])
        else:
            _show_each(reports)
        raise_when_exceeded(reports)
        return
    asked |= {"by_layer": by_layer, "baseline": baseline, "report": report, "beside": beside}
    asked |= {"junit": junit_file, "plots": plots}
    with show.progress_bar(quiet) as progress:
        found = vera_edge.drift(reference, artefacts[0], progress=progress, **asked)
    if as_json:
        show.print_json(found.to_dict())
    else:
        _show(found)
    found.raise_when_exceeded()


def _show_each(reports: Sequence[DriftReport | EncoderReport]) -> None:
    """A line for each artefact, then what is to be said of each."""
    console, first = show.out(), reports[0]
    console.print(f"against {first.reference.name} ({first.reference.kind})")
    text = first.text
    console.print(f"on {text.source}: {text.tokens} tokens in {text.windows} windows of {text.window}\n")
    table = Table("", *_few(first), "retained effect", "MB", "", box=None, pad_edge=False)
    for found in reports:
        kept = "" if found.retained is None else f"{found.retained.value:.4f}"
        size = f"{found.candidate.bytes / 1e6:,.1f}"
        table.add_row(found.candidate.path, *_few(found).values(), kept, size, found.verdict.level)
    console.print(table)
    for found in reports:
        console.print(f"\n{found.candidate.path}: {found.verdict.sentence}")
        _show_notes(found)


def _show(found: DriftReport | EncoderReport) -> None:
    console = show.out()

    def say(words: str) -> None:
        console.print(words)

    text, level = found.text, found.verdict.level
    say(f"{found.candidate.name} ({found.candidate.kind})")
    say(f"against {found.reference.name} ({found.reference.kind})")
    say(f"on {text.source}: {text.tokens} tokens in {text.windows} windows of {text.window}\n")
    console.print(_figures(found) if isinstance(found, vera_edge.DriftReport) else _encoder_figures(found))
    console.print(f"\n[bold {_LEVELS[level]}]{level}[/]  {escape(found.verdict.sentence)}", markup=True)
    _show_notes(found)


def _few(found: DriftReport | EncoderReport) -> dict[str, str]:
    """The figures that artefacts are told apart by."""
    if not isinstance(found, vera_edge.DriftReport):
        return {name: f"{estimate.value:.4f}" for name, estimate in _estimates(found).items()}
    kl = found.fidelity.kl
    return {
        "mean KL, nats": f"{kl.mean.value:.4g}",
        "99 % KL": f"{kl.quantiles['p99']:.4g}",
        "top-1 agreement": f"{found.fidelity.same_top1.value:.4f}",
    }


def _show_notes(found: DriftReport | EncoderReport) -> None:
    """What was remarked, and what became of each limit."""
    console = show.out()
    for note in found.notes:
        console.print(f"note: {note}")
    for outcome in found.outcomes:
        state = f"[{_STATES[outcome.state]}]{outcome.state}[/]"
        console.print(f"{state}  {escape(outcome.sentence)}", markup=True)


def _estimates(found: EncoderReport) -> dict[str, Interval]:
    """What was measured of an encoder, by its name in words."""
    return {
        name.replace("_", " "): estimate
        for name, estimate in vars(found.measured).items()
        if isinstance(estimate, vera_edge.Interval)
    }


def _encoder_figures(found: EncoderReport) -> Table:
    """Every estimate of the artefact, beside the base's."""
    table = Table("", "artefact", "95 % interval", "base", box=None, pad_edge=False)
    for name, estimate in _estimates(found).items():
        beside = getattr(found.effect, name.replace(" ", "_"), None)
        base = f"{beside.value:.4f}" if isinstance(beside, vera_edge.Interval) else ""
        table.add_row(name, f"{estimate.value:.4f}", _interval(estimate), base)
    if found.retained is not None:
        table.add_row("retained effect", f"{found.retained.value:.4f}", _interval(found.retained), "")
    return table


def _figures(found: DriftReport) -> Table:
    table = Table(box=None, pad_edge=False)
    columns: list[tuple[str, Comparison]] = [("fidelity", found.fidelity)]
    columns += [(name, c) for name, c in (("effect", found.effect), ("noise", found.noise)) if c is not None]
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for words, figure in _ROWS:
        table.add_row(words, *(figure(comparison) for _, comparison in columns))
    if found.retained is not None:
        table.add_row("retained effect", f"{found.retained.value:.4f}")
        table.add_row("  95 % interval", _interval(found.retained))
    table.add_row(
        "bytes on disk", f"{found.candidate.bytes:,}", f"{found.base.bytes:,}" if found.base else ""
    )
    return table
