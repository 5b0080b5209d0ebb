"""`vera-edge inspect`: what an adapter is, and whether it fits a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    json_option,
    needs_base,
    out,
    print_json,
    projection_rounding_option,
    trained_as_option,
)
from vera_edge.errors import MismatchError

if TYPE_CHECKING:
    from vera_edge.api.inspect import Cost, Inspection, Kind

_NONE_DEAD = {"VERA": "none (no lambda_b is all zeros)"}


@click.command()
@click.argument("adapter", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base model's folder.")
@projection_rounding_option
@trained_as_option
@json_option
def inspect(
    adapter: Path,
    base: Path | None,
    projection_rounding: str | None,
    trained_as: str | None,
    as_json: bool,
) -> None:
    """Say what ADAPTER is, whether it fits a base, and what it costs on the device."""
    needs_base(base, trained_as)
    result = vera_edge.inspect(
        adapter, base=base, projection_rounding=projection_rounding, trained_as=trained_as
    )
    if as_json:
        print_json(result.to_dict())
    else:
        console = out()
        console.print(_facts(result))
        console.print(_kinds(result.kinds))
        merged = "it can only be merged" + (", or become a LoRA beside a base" if result.as_pairs else "")
        console.print(merged if result.cost is None else _cost(result.cost))
    if result.misfit:
        raise MismatchError(result.misfit)


def _facts(result: Inspection) -> Table:
    table = Table(f"{result.title} adapter {result.name}", box=SIMPLE_HEAD)
    table.add_column(overflow="fold")
    rows = {
        "folder": result.path,
        "digest": result.adapter_digest,
        "trained on": result.base_name or "not recorded",
        "PEFT version": result.peft_version or "not recorded (before 0.18.1)",
        **({"what it does": result.does} if result.does else {}),
        **_rank(result),
        "parameters": f"{result.parameters:,}",
        "layers": _ranges(result.layers) or "none numbered",
        "trained biases": str(result.biases),
        "whole modules": ", ".join(result.modules_to_save) or "none",
        **({"embeddings": ", ".join(result.embeddings)} if result.embeddings else {}),
        "dead branches": ", ".join(result.dead) or _NONE_DEAD.get(result.method, "none"),
    }
    if result.spec is not None:
        rows["projections"] = (
            f"A {result.spec.rank} x {result.spec.in_max}, B {result.spec.out_max} x {result.spec.rank}, "
            f"{result.spec.rounding}, {result.digest}"
        )
    rows["found"] = result.how or result.unresolved or "not resolved"
    if result.seed is not None:
        rows["verified"] = "yes, against the saved projections" if result.verified else "no"
    rows["fits the base"] = {None: "no base given", True: "yes", False: "no"}[result.fits]
    for note in result.notes:
        rows["note"] = f"{rows['note']}; {note}" if "note" in rows else note
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _rank(result: Inspection) -> dict[str, str]:
    if result.seed is not None:
        return {"rank, seed": f"{result.rank}, {result.seed}"}
    return {"rank": str(result.rank)} if result.rank else {}


def _kinds(kinds: tuple[Kind, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    trained = list(dict.fromkeys(name for kind in kinds for name in kind.ranges))
    for name in ("module", "count", "out x in", *(f"|{_short(name)}|" for name in trained), "dead"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for kind in kinds:
        shape = "" if kind.shape is None else f"{kind.shape[0]} x {kind.shape[1]}"
        ranges = [_range(kind.ranges.get(name)) for name in trained]
        table.add_row(kind.name, str(kind.modules), shape, *ranges, str(kind.dead))
    return table


def _short(name: str) -> str:
    """What was trained, without the ends that every name has."""
    return name.removesuffix(".weight").removesuffix("_vector")


def _range(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.0e}..{found[1]:.2g}"


def _cost(cost: Cost) -> Table:
    table = Table("on the device, as side-branches", "", box=SIMPLE_HEAD)
    table.add_row("vectors", ", ".join(f"{name} {_bytes(size)}" for name, size in cost.vectors.items()))
    if cost.projections is not None:
        shown = ", ".join(f"{name} {_bytes(size)}" for name, size in cost.projections.items())
        table.add_row("projections", shown)
    if cost.branch_macs is not None and cost.base_macs:
        share = cost.branch_macs / cost.base_macs
        shown = f"{cost.branch_macs:,}, {share:.1%} of the base's linear layers ({cost.base_macs:,})"
        table.add_row("multiply-accumulates per token", shown)
    return table


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
