"""`vera-edge projections`: regenerate, verify or write an adapter's projections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    needs_base,
    out,
    print_json,
    projection_rounding_option,
    trained_as_option,
)

if TYPE_CHECKING:
    from vera_edge.api.projections import Provenance


@click.command()
@click.argument("adapter", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base model's folder; needed when ADAPTER doesn't hold them.")
@click.option("--verify", is_flag=True, help="Fail when the saved projections aren't what the seed gives.")
@click.option("-o", "--out", "target", type=FOLDER, help="Write vera_A and vera_B to this safetensors file.")
@projection_rounding_option
@trained_as_option
@force_option
@json_option
def projections(
    adapter: Path,
    base: Path | None,
    verify: bool,
    target: Path | None,
    projection_rounding: str | None,
    trained_as: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Regenerate the projections ADAPTER was trained with, and say how they were found."""
    if verify and target is not None:
        raise click.UsageError("--verify and --out don't go together")
    needs_base(base, trained_as)
    found = vera_edge.projections(
        adapter,
        base=base,
        verify=verify,
        out=target,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        force=force,
    )
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
