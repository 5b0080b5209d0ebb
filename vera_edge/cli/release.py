"""`vera-edge release`: one recipe in, gated and signed bundles out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vera_edge.cli import show

if TYPE_CHECKING:
    from vera_edge.release.work import Job


@click.command()
@click.argument("recipe", type=show.FOLDER)
@click.option(
    "-o", "--out", type=show.FOLDER, required=True, help="Folder that the bundles are published in."
)
@click.option("--dry-run", is_flag=True, help="Show the bundles that would be made; touch nothing.")
@click.option("--resume", is_flag=True, help="Go on with a release that was interrupted (always done).")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes at once.")
@click.option("--ray-address", metavar="HOST:PORT", help="A Ray cluster that exists.")
@click.option("--store", type=show.FOLDER, help="Where finished work is kept between runs.")
@show.json_option
@show.quiet_option
def release(
    recipe: Path,
    out: Path,
    dry_run: bool,
    resume: bool,
    engine: str,
    workers: int,
    ray_address: str | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make every bundle that RECIPE (TOML) describes, measure it, and publish those that pass their gates.

    RECIPE names bases, adapters, variants (target, mode, weights) and limits; docs/release.md has every key.
    Work that is done already, in this or another release, isn't done again. Exit code 3 when a gate stopped a
    bundle, 2 when an input is at fault; the other bundles are published all the same.
    """
    from vera_edge.engine import Engine
    from vera_edge.release import run as releases

    if dry_run:
        _show_plan(releases.plan(recipe, out, store)[1], as_json)
        return
    chosen = Engine(engine, workers, ray_address)
    with show.progress_bar(quiet) as progress:
        made = releases.release(
            recipe,
            out,
            chosen,
            store,
            progress,
            lambda one: (
                None if as_json else click.echo(f"{one.state:>9}  {one.name}  {one.message}".rstrip())
            ),
        )
    if as_json:
        show.print_json(made.to_dict())
    else:
        click.echo(releases.summary(made))
    made.raise_when_incomplete()


def _show_plan(jobs: tuple[Job, ...], as_json: bool) -> None:
    if as_json:
        bundles = [
            {"name": job.name, "base": job.adapter.base, "variant": job.variant.model_dump(mode="json")}
            for job in jobs
        ]
        show.print_json({"bundles": bundles})
        return
    for job in jobs:
        click.echo(f"{job.name}  ({job.variant.mode}, {job.variant.weights}, on {job.adapter.base})")
