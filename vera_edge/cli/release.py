"""`vera-edge release`: one recipe in, gated and signed bundles out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import vera_edge
from vera_edge import printable
from vera_edge.cli import show

if TYPE_CHECKING:
    from vera_edge.api.release import ReleaseJob, Result


class _RecipeGroup(click.Group):
    """A group whose first word may be a recipe: `release RECIPE` is `release make RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["make", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RecipeGroup, no_args_is_help=True)
def release() -> None:
    """Make every bundle that a recipe describes: `vera-edge release RECIPE.toml -o OUT`.

    A recipe (TOML) names bases, adapters, variants and limits; docs/release.md has every key.
    """


@release.command()
@click.argument("recipe", type=show.FOLDER)
@click.option(
    "-o", "--out", type=show.FOLDER, required=True, help="Folder that the bundles are published in."
)
@click.option("--dry-run", is_flag=True, help="Show the bundles that would be made; touch nothing.")
@click.option(
    "--resume/--fresh",
    default=True,
    help="Take up what earlier runs finished (the default), or make everything again.",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes at once, on this machine.",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="A Ray cluster that exists; without one, --engine ray starts its own.",
)
@click.option("--store", type=show.FOLDER, help="Where finished work is kept between runs.")
@show.json_option
@show.quiet_option
def make(
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
    if dry_run:
        _show_plan(vera_edge.plan_release(recipe, out=out, store=store), as_json)
        return
    with show.progress_bar(quiet) as progress:
        made = vera_edge.release(
            recipe,
            out=out,
            resume=resume,
            engine=engine,
            workers=workers,
            ray_address=ray_address,
            store=store,
            progress=progress,
            on_result=_say,
        )
    for note in dict.fromkeys(note for result in made.results for note in result.notes):
        show.note(note)
    if as_json:
        show.print_json(made.to_dict())
    else:
        click.echo(printable.lines(made.summary()))
    made.raise_when_incomplete()


def _say(result: Result) -> None:
    click.echo(printable.line(_line(result)), err=True)
    if result.trace:  # a bug: what is needed to find it
        click.echo(printable.lines(result.trace), err=True)


def _line(result: Result) -> str:
    """What became of a bundle, and what this run spent on it."""
    spent = ", ".join(f"{stage} {took:.1f} s" for stage, took in result.seconds.items() if took >= 0.1)
    return "  ".join(part for part in (f"{result.state:>9}", result.name, spent, result.message) if part)


def _show_plan(jobs: tuple[ReleaseJob, ...], as_json: bool) -> None:
    if as_json:
        bundles = [
            {"name": job.name, "base": job.adapter.base, "variant": job.variant.model_dump(mode="json")}
            for job in jobs
        ]
        show.print_json({"bundles": bundles})
        return
    for job in jobs:
        click.echo(
            printable.line(f"{job.name}  ({job.variant.mode}, {job.variant.weights}, on {job.adapter.base})")
        )


@release.command()
@click.argument("bundle", type=show.FOLDER)
@click.option("--inputs", type=show.FOLDER, default=Path(), help="Folder that the recipe's paths start from.")
@show.json_option
@show.quiet_option
def rebuild(bundle: Path, inputs: Path, as_json: bool, quiet: bool) -> None:
    """Make a released BUNDLE again from its inputs, and compare the two byte for byte.

    Exit code 3 when they differ.
    """
    with show.progress_bar(quiet or as_json) as progress:
        found = vera_edge.rebuild(bundle, inputs=inputs, progress=progress)
    if as_json:
        show.print_json(found.to_dict())
    else:
        click.echo(printable.line(f"{bundle}: {'the same bytes' if found.same else 'differs'}"))
        for tool, (then, now) in found.tools.items():
            click.echo(printable.line(f"made with {tool} {then}, here is {now}"))
    if not found.same:
        raise vera_edge.DriftExceeded(
            f"{bundle} wasn't made again as it is: {', '.join(found.differing[:5])} differ"
        )
