"""`vera-edge projections`: regenerate, verify or write an adapter's projections."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vera_edge.adapters import projection
from vera_edge.adapters import vera as adapters
from vera_edge.base.trained_as import TrainedAs
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    needs_base,
    out,
    print_json,
    projection_dtype_option,
    trained_as_option,
)
from vera_edge.storage.files import check_output
from vera_edge.trained import model as trained_base
from vera_edge.trained.provenance import Provenance, resolve_for_command
from vera_edge.trained.provenance import verify as verify_saved


@click.command()
@click.argument("adapter", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base model's folder; needed when ADAPTER doesn't hold them.")
@click.option("--verify", is_flag=True, help="Fail when the saved projections aren't what the seed gives.")
@click.option("--out", "target", type=FOLDER, help="Write vera_A and vera_B to this safetensors file.")
@projection_dtype_option
@trained_as_option
@force_option
@json_option
def projections(
    adapter: Path,
    base: Path | None,
    verify: bool,
    target: Path | None,
    projection_dtype: str | None,
    trained_as: TrainedAs | None,
    force: bool,
    as_json: bool,
) -> None:
    """Regenerate the projections ADAPTER was trained with, and say how they were found."""
    if verify and target is not None:
        raise click.UsageError("--verify and --out don't go together")
    if target is not None:
        check_output(target, force)
    needs_base(base, trained_as)
    checkpoint = None
    if base is None:
        read = adapters.read(adapter)
    else:
        checkpoint, ((read, _),) = trained_base.read(base, [(adapter, 1.0)], trained_as=trained_as)
    found = (verify_saved if verify else resolve_for_command)(read, checkpoint, projection_dtype)
    if target is not None:
        projection.write(found.projections, target)
    if as_json:
        print_json(found.to_dict())
    else:
        out().print(_table(found))


def _table(found: Provenance) -> Table:
    spec = found.spec
    table = Table("VeRA projections", box=SIMPLE_HEAD)
    table.add_column(overflow="fold")
    table.add_row("A", f"{spec.rank} x {spec.in_max}")
    table.add_row("B", f"{spec.out_max} x {spec.rank}")
    table.add_row("seed", str(spec.seed))
    table.add_row("rounding", spec.rounding)
    table.add_row("kernel", "fused multiply-add" if spec.fused else "two roundings")
    table.add_row("found", found.how)
    table.add_row("verified", "yes, against the saved projections" if found.verified else "no")
    table.add_row("digest", found.projections.digest)
    for note in found.notes:
        table.add_row("note", note)
    return table
