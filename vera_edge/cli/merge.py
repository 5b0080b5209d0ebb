"""`vera-edge merge`: adapters merged into their base, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge import printable
from vera_edge.cli.show import (
    FOLDER,
    calibration_option,
    compute_device_option,
    effort_option,
    err,
    force_option,
    json_option,
    method_option,
    more_adapters_option,
    out,
    plan_option,
    print_json,
    progress_bar,
    projection_rounding_option,
    quiet_option,
    refuse_beside_plan,
    tokenizer_option,
    trained_as_option,
    weight_option,
)
from vera_edge.cli.show import note as tell_note

if TYPE_CHECKING:
    from vera_edge.api.merge import MergeCost, MergeReport, Plan, PlannedMerge

_SHOWN = 5


@click.command()
@click.argument("base", type=FOLDER)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", "folder", type=FOLDER, required=True, help="The folder to write.")
@click.option("--each", is_flag=True, help="Merge every ADAPTER by itself, into OUT/<its folder's name>.")
@click.option(
    "--to",
    default="same",
    show_default=True,
    metavar="FORMAT",
    help="How the linear layers are stored: same, fp32, bf16, fp16, nf4, fp4, int8, gptq, gptq8, awq, w4a16, "
    "w8a16, w8a8, fp8, fp8-dynamic.",
)
@click.option(
    "--block-size", type=int, help="Weights to one scale: of nf4, fp4 (default 64), gptq, awq, w4a16 (128)."
)
@click.option("--double-quant", is_flag=True, help="Quantize the scales of nf4 and fp4 too.")
@plan_option
@method_option
@effort_option
@calibration_option
@compute_device_option
@more_adapters_option
@weight_option
@projection_rounding_option
@trained_as_option
@tokenizer_option
@click.option("--dry-run", is_flag=True, help="Show the plan, its bytes and about its time; write nothing.")
@click.option("--workers", type=int, help="Layers at once, each in a thread; by default as many as cores.")
@click.option("--max-memory", metavar="SIZE", help="What the merge may take, like 2GB or 2GiB; see the docs.")
@click.option(
    "--engine", default="local", show_default=True, help="local, or ray: a cluster that shares the disk."
)
@click.option("--ray-address", metavar="ADDRESS", help="Of the Ray cluster; without one, this machine's.")
@force_option
@quiet_option
@json_option
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    folder: Path,
    each: bool,
    to: str,
    block_size: int | None,
    double_quant: bool,
    plan_file: Path | None,
    method: str | None,
    effort: str | None,
    calibration: tuple[str, ...],
    compute_device: str,
    more: list[tuple[Path, float]],
    weight: float,
    projection_rounding: str | None,
    trained_as: str | None,
    tokenizer: Path | None,
    dry_run: bool,
    workers: int | None,
    max_memory: str | None,
    engine: str,
    ray_address: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTER into BASE, and say how much of it the format keeps.

    The output loads with transformers as any model does. A warning says when rounding drowned the adapter.
    """
    _check_words(adapters, each, more, plan_file)
    refuse_beside_plan("to", "block_size", "double_quant")
    asked: dict[str, Any] = {
        "to": to,
        "block_size": block_size,
        "double_quant": double_quant,
        "projection_rounding": projection_rounding,
        "trained_as": trained_as,
        "tokenizer": tokenizer,
    }
    pairs = [(adapters[0], weight), *more]
    if dry_run:
        planned = (
            {
                folder / name: one
                for name, one in vera_edge.plan_merge_each(base, adapters, weight=weight, **asked).items()
            }
            if each
            else {folder: vera_edge.plan_merge(base, pairs, plan=plan_file, **asked)}
        )
        _show_plans(planned, each, as_json)
        return
    asked |= {
        "method": method,
        "effort": effort,
        "calibration": calibration,
        "compute_device": compute_device,
        "workers": workers,
        "max_memory": max_memory,
        "engine": engine,
        "ray_address": ray_address,
        "force": force,
    }
    with progress_bar(quiet or as_json, in_bytes=("merging",)) as progress:
        reports = (
            vera_edge.merge_each(base, adapters, out=folder, weight=weight, progress=progress, **asked)
            if each
            else [vera_edge.merge(base, pairs, out=folder, plan=plan_file, progress=progress, **asked)]
        )
    if as_json:
        told = [report.to_dict() for report in reports]
        print_json({"models": told} if each else told[0])
    said = set[str]()
    for report in reports:
        if not as_json:
            _show(report, said)
        if report.warning:
            which = f"{report.folder.name}: " if each else ""
            err().print(printable.line(f"warning: {which}{report.warning}"), soft_wrap=True)


def _check_words(
    adapters: tuple[Path, ...], each: bool, more: list[tuple[Path, float]], plan_file: Path | None
) -> None:
    if each and (more or plan_file):
        raise click.UsageError("--each merges every ADAPTER by itself; leave out --adapter and --plan")
    if len(adapters) > 1 and not each:
        raise click.UsageError(
            "several adapters: --each merges every one by itself, --adapter PATH=WEIGHT adds one to the first"
        )


def _show_plans(planned: Mapping[Path, PlannedMerge], each: bool, as_json: bool) -> None:
    if as_json:
        told = {folder.name: one.to_dict() for folder, one in planned.items()}
        print_json({"plans": told} if each else next(iter(told.values())))
    else:
        for folder, one in planned.items():
            if each:
                out().print(str(folder))
            out().print(_plan_table(one.plan))
            _show_estimate(one.estimate())
    for note in dict.fromkeys(note for one in planned.values() for note in one.notes):
        tell_note(note)


def _plan_table(plan: Plan) -> Table:
    table = Table("layer", "action", "from", "to", "out x in", box=SIMPLE_HEAD)
    for step in plan.steps:
        out_features, in_features = step.shape
        table.add_row(step.module, step.action, step.source, step.result, f"{out_features} x {in_features}")
    return table


def _show_estimate(found: MergeCost) -> None:
    table = Table("one worker", "", box=SIMPLE_HEAD)
    table.add_row("reads", f"{found.reads / 1e6:,.1f} MB")
    table.add_row("writes", f"{found.writes / 1e6:,.1f} MB")
    table.add_row("memory", f"{found.memory / 1e6:,.0f} MB at most")
    table.add_row("time", f"about {found.seconds:,.1f} s, and calibration where the method needs it")
    out().print(table)


def _show(report: MergeReport, said: set[str]) -> None:
    """Print a report; of its notes those that no report before had, which `said` keeps."""
    console, whole = out(), report.survival
    table = Table(str(report.folder), "", box=SIMPLE_HEAD)
    names = ", ".join(f"{name} (weight {weight:g})" for name, _, weight in report.adapters)
    rows = {
        "adapters": names,
        "linear layers": ", ".join(f"{count} in {name}" for name, count in report.results.items()),
        "merged layers": str(len(report.layers)),
        "size": f"{report.size / 1e6:,.1f} MB",
    }
    if whole.retained is not None:
        rows["delta / weight"] = f"{whole.size or 0:.2%}"
        rows["retained share"] = f"{whole.retained:.1%} of the delta"
        rows["rounding noise"] = f"{whole.noise or 0:.3g} times the delta"
    if report.unchanged:
        rows["unchanged"] = f"{len(report.unchanged)} layers, whose lambda_b is all zeros"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if report.warning and report.drowned:
        console.print(_layers(report))
    for note in report.notes:
        if note not in said:
            console.print(note)
    said.update(report.notes)


def _layers(report: MergeReport) -> Table:
    """The layers that lost most."""
    table = Table("drowned layers, the noisiest", "format", "retained", "noise", box=SIMPLE_HEAD)
    for layer in report.drowned[:_SHOWN]:
        found = layer.survival
        table.add_row(layer.module, layer.result, f"{found.retained or 0:.1%}", f"{found.noise or 0:.3g}")
    return table
