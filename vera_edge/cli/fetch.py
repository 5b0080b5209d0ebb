"""`vera-edge fetch` and `vera-edge diff`: what a slow link has to carry from one version to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@click.command()
@click.argument("source")
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The folder to write.")
@click.option("--have", type=FOLDER, help="An older version; what it holds isn't transferred again.")
@force_option
@json_option
@quiet_option
@takes_trust
def fetch(
    source: str, output: Path, have: Path | None, force: bool, as_json: bool, quiet: bool, **trust: Any
) -> None:
    """Bring the bundle at SOURCE, a folder or an HTTP address, here; an interrupted fetch goes on.

    Any static server will do. With --have only the chunks that the older version lacks are transferred, where
    the server has byte ranges; one without sends each file that changed once.
    """
    with progress_bar(quiet or as_json) as progress:
        found = vera_edge.fetch(
            source, out=output, have=have, force=force, progress=progress, tell=tell, **trust
        )
    if as_json:
        print_json(found.to_dict())
        return
    out().print(
        f"{found.folder}: {found.size / 1e6:.2f} MB, {found.transferred / 1e6:.3f} MB of it transferred\n"
        f"digest {found.digest}"
    )


@click.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@json_option
def diff(old: Path, new: Path, as_json: bool) -> None:
    """Say what changed from the bundle OLD to NEW: facts, drift, plan, files, bytes to transfer."""
    found = vera_edge.diff(old, new)
    if as_json:
        print_json(found.to_dict())
        return
    for line in found.lines():
        out().print(line)
