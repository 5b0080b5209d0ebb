"""`vera-edge merge`: adapters merged into their base, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vera_edge import merge as merging
from vera_edge import plan as plans
from vera_edge.cli.show import (
    FOLDER,
    calibration_option,
    err,
    force_option,
    json_option,
    method_option,
    more_adapters_option,
    out,
    plan_option,
    print_json,
    progress_bar,
    projection_dtype_option,
    quiet_option,
    refuse_beside_plan,
    weight_option,
)
from vera_edge.engine import Engine
from vera_edge.formats import block_option
from vera_edge.plan import Plan
from vera_edge.precision import parse_size
from vera_edge.weight_rounding import Rounding, merge_to_folder

_SHOWN = 5


@click.command()
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.option("-o", "--out", "folder", type=FOLDER, required=True, help="The folder to write.")
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
@calibration_option
@more_adapters_option
@weight_option
@projection_dtype_option
@click.option("--dry-run", is_flag=True, help="Show the plan, its bytes and about its time; write nothing.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that merge at once.")
@click.option(
    "--max-memory", metavar="SIZE", help="What all of them together may take, like 2GB or 2GiB; see the docs."
)
@click.option(
    "--engine", default="local", show_default=True, help="local, or ray: a cluster that shares the disk."
)
@click.option("--ray-address", metavar="ADDRESS", help="Of the Ray cluster; without one, this machine's.")
@force_option
@quiet_option
@json_option
def merge(
    base: Path,
    adapter: Path,
    folder: Path,
    to: str,
    block_size: int | None,
    double_quant: bool,
    plan_file: Path | None,
    method: str | None,
    calibration: str,
    more: list[tuple[Path, float]],
    weight: float,
    projection_dtype: str | None,
    dry_run: bool,
    workers: int,
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
    where = Engine(engine, workers, ray_address)
    resources = merging.Resources(where, None if max_memory is None else parse_size(max_memory))
    refuse_beside_plan("to", "block_size", "double_quant")
    made = None if plan_file is None else plans.read(plan_file)
    options = {block_option(to): block_size} if block_size is not None else {}
    options |= {"double_quant": True} if double_quant else {}
    ready = merging.prepare(base, [(adapter, weight), *more], to, options, projection_dtype, made)
    if dry_run:
        if as_json:
            print_json(ready.plan.to_dict())
        else:
            out().print(_plan_table(ready.plan))
            _show_estimate(merging.estimate(ready))
        return
    with progress_bar(quiet or as_json, in_bytes=("merging",)) as progress:
        report = merge_to_folder(ready, folder, Rounding(method, calibration), progress, force, resources)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if report.warning:
        err().print(f"warning: {report.warning}", markup=False, soft_wrap=True)


def _plan_table(plan: Plan) -> Table:
    table = Table("layer", "action", "from", "to", "out x in", box=SIMPLE_HEAD)
    for step in plan.steps:
        out_features, in_features = step.shape
        table.add_row(step.module, step.action, step.source, step.result, f"{out_features} x {in_features}")
    return table


def _show_estimate(found: merging.Estimate) -> None:
    table = Table("one process", "", box=SIMPLE_HEAD)
    table.add_row("reads", f"{found.reads / 1e6:,.1f} MB")
    table.add_row("writes", f"{found.writes / 1e6:,.1f} MB")
    table.add_row("memory", f"{found.memory / 1e6:,.0f} MB at most")
    table.add_row("time", f"about {found.seconds:,.1f} s, and calibration where the method needs it")
    out().print(table)


def _show(report: merging.MergeReport) -> None:
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
        console.print(note, markup=False)


def _layers(report: merging.MergeReport) -> Table:
    """The layers that lost most."""
    table = Table("drowned layers, the noisiest", "format", "retained", "noise", box=SIMPLE_HEAD)
    for layer in report.drowned[:_SHOWN]:
        found = layer.survival
        table.add_row(layer.module, layer.result, f"{found.retained or 0:.1%}", f"{found.noise or 0:.3g}")
    return table
