"""`vera-edge plan`: formats chosen by measurement, as a file that merge and export take."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli import show


@click.command()
@click.argument("base", type=show.FOLDER)
@click.argument("adapter", type=show.FOLDER)
@click.option("-o", "--out", "file", type=show.FOLDER, required=True, help="The plan to write, JSON.")
@click.option("--max-size", metavar="SIZE", help="Bytes of the whole export, like 90MB or 90MiB.")
@click.option("--max-kl", type=float, help="Mean KL divergence in nats from the model as trained.")
@click.option(
    "--max-latency",
    metavar="RATIO",
    help="Time of the layers' products over that of the quickest choice, like 1.2x.",
)
@click.option(
    "--device-times",
    type=show.FOLDER,
    metavar="FILE",
    help="Times of products on the device, from bench --products --json there; else this machine's.",
)
@click.option(
    "--mode",
    type=click.Choice(["merged", "branch"]),
    default="merged",
    show_default=True,
    help="merged: the adapter in the weights. branch: beside them, and swapped at run time.",
)
@click.option("--target", default="onnx", show_default=True, help="What it is exported to: onnx.")
@click.option(
    "--formats",
    default="int4,int8",
    show_default=True,
    metavar="LIST",
    help="What layers may be stored as, of int4, int8, nf4, fp4, fp32; integers also with a block, like "
    "int8:128.",
)
@click.option("--data", metavar="FILE", help="Text to measure on, or built-in; else the calibration's.")
@click.option(
    "--tokens",
    default=512,
    show_default=True,
    help="About how many to measure each unit on; plans are measured on twice as many.",
)
@click.option("--export", "keep", type=show.FOLDER, help="Also write the export that was measured, to here.")
@show.method_option
@show.effort_option
@show.calibration_option
@show.compute_device_option
@show.more_adapters_option
@show.weight_option
@show.projection_rounding_option
@show.trained_as_option
@click.option("--max-memory", metavar="SIZE", help="Read a model of over half of it, like 6GB, by layer.")
@show.force_option
@show.quiet_option
@show.json_option
def plan(
    base: Path,
    adapter: Path,
    file: Path,
    max_size: str | None,
    max_kl: float | None,
    max_latency: str | None,
    device_times: Path | None,
    mode: str,
    target: str,
    formats: str,
    data: str | None,
    tokens: int,
    keep: Path | None,
    method: str | None,
    effort: str | None,
    calibration: tuple[str, ...],
    compute_device: str,
    more: list[tuple[Path, float]],
    weight: float,
    projection_rounding: str | None,
    trained_as: str | None,
    max_memory: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Choose how each layer of BASE with ADAPTER is stored: what loses least within --max-size or
    --max-latency, or the smallest export within --max-kl.

    Every unit is quantized alone and measured; the plan as a whole in torch, then exported.
    """
    with show.progress_bar(quiet or as_json) as progress:
        found = vera_edge.plan(
            base,
            [(adapter, weight), *more],
            out=file,
            max_size=max_size,
            max_kl=max_kl,
            max_latency=max_latency,
            device_times=device_times,
            mode=mode,
            target=target,
            formats=[name.strip() for name in formats.split(",") if name.strip()],
            data=data,
            tokens=tokens,
            export=keep,
            method=method,
            effort=effort,
            calibration=calibration,
            compute_device=compute_device,
            projection_rounding=projection_rounding,
            trained_as=trained_as,
            max_memory=max_memory,
            force=force,
            progress=progress,
        )
    if as_json:
        show.print_json(found.to_dict())
    else:
        _show(file, found)


def _show(file: Path, found: vera_edge.ChosenPlan) -> None:
    console, trial = show.out(), found.trial
    table = Table(str(file), "", box=SIMPLE_HEAD)
    counts: dict[str, int] = {}
    for name in found.picks.values():
        counts[name] = counts.get(name, 0) + 1
    rows = {
        "units": ", ".join(f"{count} as {name}" for name, count in sorted(counts.items())),
        "size of the export": f"{trial.size / 1e6:,.3f} MB",
        "bits per weight": f"{found.bits:.2f}",
        "KL of the units alone": f"{trial.sum_kl:.3g} in all",
        "KL predicted": f"{trial.predicted_kl:.3g}",
        "KL measured": f"{trial.kl:.3g}",
        "optimality gap": f"{found.gap:.2%}" if found.gap else "none",
        **({"latency, products": f"{found.latency:.2f}x the quickest"} if found.latency else {}),
        **({"a token's products": f"{1e3 * found.token_seconds:.3g} ms"} if found.token_seconds else {}),
        "took": ", ".join(f"{what} {seconds:g} s" for what, seconds in found.seconds.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(_front(found))
    for note in found.notes:
        console.print(note)


def _front(found: vera_edge.ChosenPlan) -> Table:
    """What else could be had, by prediction."""
    table = Table("size, MB", "KL, predicted", "", box=SIMPLE_HEAD)
    for point in found.front:
        table.add_row(f"{point.size / 1e6:,.3f}", f"{point.kl:.3g}", "chosen" if point.chosen else "")
    return table
