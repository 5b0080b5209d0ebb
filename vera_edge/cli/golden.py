"""`vera-edge golden`: ask the model as trained, and put what it says into a bundle."""

from __future__ import annotations

from pathlib import Path

import click

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    json_option,
    note,
    out,
    print_json,
    progress_bar,
    quiet_option,
    trained_as_option,
)


@click.command()
@click.argument("bundle", type=FOLDER)
@click.argument("base", type=FOLDER)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.option(
    "--prompts",
    type=FOLDER,
    metavar="FILE",
    help="One prompt, or one text of an encoder, a line, instead of the built-in ones.",
)
@click.option("--max-kl", type=float, help="Limit to put into the bundle: mean KL divergence in nats.")
@click.option("--min-top1", type=float, help="Limit to put into the bundle: top-1 agreement, 0 to 1.")
@click.option("--min-cosine", type=float, help="Limit for embeddings: mean cosine with the reference's.")
@click.option(
    "--max-relative-error",
    type=float,
    help="Limit for a reranker or regression: mean error, in standard deviations of the reference's values.",
)
@click.option("--max-largest-error", type=float, help="The same: the largest error.")
@click.option(
    "--min-rank-correlation", type=float, help="The same: Spearman's rank correlation over the texts."
)
@click.option("--projection-rounding", help="What the projections were rounded to, when it can't be told.")
@trained_as_option
@click.option("--max-memory", metavar="SIZE", help="Run a model of over half of it, like 6GB, by layer.")
@json_option
@quiet_option
def golden(
    bundle: Path,
    base: Path,
    adapters: tuple[Path, ...],
    prompts: Path | None,
    projection_rounding: str | None,
    trained_as: str | None,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
    **limits: float | None,
) -> None:
    """Ask the model as trained (BASE with ADAPTERS) and add its answers to BUNDLE, to validate it by.

    Each adapter is asked at the weight that BUNDLE has it at.
    """
    with progress_bar(quiet or as_json) as progress:
        manifest = vera_edge.golden(
            bundle,
            base,
            adapters,
            prompts=prompts,
            projection_rounding=projection_rounding,
            trained_as=trained_as,
            max_memory=max_memory,
            progress=progress,
            tell=note,
            **limits,
        )
    size = manifest.files[manifest.golden or ""].size
    if as_json:
        print_json({"digest": manifest.digest, "file": manifest.golden, "size": size})
        return
    out().print(f"{bundle}: {manifest.golden}, {size / 1e3:.0f} KB; digest {manifest.digest}")
