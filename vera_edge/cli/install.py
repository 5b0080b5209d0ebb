"""`vera-edge install`, `update`, `rollback`, `patch`: versions of a bundle on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    out,
    print_json,
    progress_bar,
    quiet_option,
    tell,
)
from vera_edge.cli.trust import takes_trust

if TYPE_CHECKING:
    from vera_edge.api.install import Installed

_validate_option = click.option(
    "--validate",
    "validated",
    is_flag=True,
    help="Run its golden vectors first; keep the old one if they fail.",
)


@click.command()
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
@_validate_option
@json_option
@quiet_option
@takes_trust
def install(src: Path, dst: Path, validated: bool, as_json: bool, quiet: bool, **trust: Any) -> None:
    """Install the bundle SRC into DST and switch DST/current to it; the last good version is kept."""
    with progress_bar(quiet or as_json) as progress:
        installed = vera_edge.install(src, dst, validate=validated, progress=progress, tell=tell, **trust)
    _show(installed, as_json)


@click.command()
@click.argument("patch", type=FOLDER)
@click.argument("dst", type=FOLDER)
@_validate_option
@json_option
@quiet_option
@takes_trust
def update(patch: Path, dst: Path, validated: bool, as_json: bool, quiet: bool, **trust: Any) -> None:
    """Update what is installed in DST by PATCH, which brings only the files that changed."""
    with progress_bar(quiet or as_json) as progress:
        installed = vera_edge.update(patch, dst, validate=validated, progress=progress, tell=tell, **trust)
    _show(installed, as_json)


@click.command()
@click.argument("dst", type=FOLDER)
@json_option
@quiet_option
@takes_trust
def rollback(dst: Path, as_json: bool, quiet: bool, **trust: Any) -> None:
    """Switch DST/current back to the version before, once every byte of it is verified."""
    with progress_bar(quiet or as_json) as progress:
        installed = vera_edge.rollback(dst, progress=progress, tell=tell, **trust)
    _show(installed, as_json)


@click.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The folder to write.")
@force_option
@json_option
@quiet_option
def patch(old: Path, new: Path, output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write what a device that runs the bundle OLD needs to run NEW: often a few kilobytes."""
    with progress_bar(quiet or as_json) as progress:
        size = vera_edge.patch(old, new, out=output, force=force, progress=progress)
    if as_json:
        print_json({"folder": str(output), "size": size})
        return
    out().print(f"{output}: {size / 1e3:.1f} KB of files; apply it with `vera-edge update {output} DST`")


def _show(result: Installed, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    previous = result.previous.name if result.previous else None
    state = "runs now" if result.changed else "ran already"
    out().print(
        f"{result.folder.name} {state}; {result.copied / 1e6:.2f} MB copied; "
        f"before it: {previous or 'nothing'}\ndigest {result.digest}"
    )
