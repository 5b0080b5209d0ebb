"""`vera-edge validate`: does a bundle do on this device what it was released to do?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

import vera_edge
from vera_edge.cli.show import FOLDER, json_option, out, print_json, progress_bar, quiet_option, tell
from vera_edge.cli.trust import takes_trust
from vera_edge.errors import DriftExceeded

if TYPE_CHECKING:
    from vera_edge.api.validate import Validation

_FIGURES = {
    "cosine": "cosine",
    "cosine_min": "least",
    "kl": "mean KL",
    "same_top1": "same answer",
    "relative_error": "error",
    "largest_error": "largest",
    "rank_correlation": "rank correlation",
}


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--max-memory", metavar="SIZE", help="Fail when this process ever held more: 400MB.")
@click.option("--max-kl", type=float, help="Replace the bundle's limit on the mean KL divergence (nats).")
@click.option("--min-top1", type=float, help="Replace the bundle's limit on top-1 agreement (0 to 1).")
@click.option("--min-cosine", type=float, help="Replace the limit on an encoder's mean cosine.")
@click.option("--max-relative-error", type=float, help="Replace that on the mean error of values.")
@click.option("--max-largest-error", type=float, help="Replace that on their largest error.")
@click.option("--min-rank-correlation", type=float, help="Replace that on their rank correlation.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; all cores by default.")
@json_option
@quiet_option
@takes_trust
def validate(
    bundle: Path,
    max_memory: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **limits_and_trust: Any,
) -> None:
    """Run BUNDLE's golden vectors on this device and hold them to its limits; exit 3 when one is broken."""
    with progress_bar(quiet or as_json) as progress:
        result = vera_edge.validate(
            bundle, max_memory=max_memory, threads=threads, progress=progress, tell=tell, **limits_and_trust
        )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
    if failed := [check for check in result.checks if not check.passed]:
        raise DriftExceeded(f"{bundle} fails on this device: {failed[0].name}, {failed[0].detail}")


def _show(result: Validation) -> None:
    console = out()
    checks = Table("check", "", "figure")
    for check in result.checks:
        checks.add_row(check.name, "pass" if check.passed else "FAIL", check.detail)
    console.print(checks, _encoder_drift(result) if result.encoder_drift else _drift(result))
    device = result.device
    console.print(f"{device['processor']}, {device['threads']} threads, {', '.join(device['features'])}")
    tools = ", ".join(f"{name} {number}" for name, number in device["tools"].items())
    peak = "unknown" if result.peak_rss is None else f"{result.peak_rss / 1e6:.0f} MB"
    console.print(f"{device['system']}, {tools}; peak memory {peak}; {result.seconds:.1f} s")
    for note in result.notes:
        console.print(f"note: {note}")


def _drift(result: Validation) -> Table:
    table = Table("adapter", "positions", "mean KL", "p99", "prompt", "steps", "top-1", "greedy")
    for row in result.drift:
        kls = (f"{value:.3g}" for value in (row.kl, row.kl_p99, row.prompt_kl, row.step_kl))
        shares = f"{row.same_top1:.4f}", f"{row.greedy:.3f}"
        table.add_row(row.adapter or _alone(result.drift), str(row.positions), *kls, *shares)
    return table


def _alone(rows: Sequence[object]) -> str:
    """What runs without a named adapter: the base beside adapters, else the model with its own merged."""
    return "(base)" if len(rows) > 1 else "(model)"


def _encoder_drift(result: Validation) -> Table:
    rows = result.encoder_drift
    shown = {name: title for name, title in _FIGURES.items() if getattr(rows[0], name) is not None}
    table = Table("adapter", "texts", *shown.values())
    for row in rows:
        named = row.adapter or _alone(rows)
        table.add_row(named, str(row.texts), *(f"{getattr(row, n):.4g}" for n in shown))
    return table
