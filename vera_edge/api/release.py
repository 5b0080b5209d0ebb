"""`vera_edge.release`, `plan_release`, `rebuild`: one recipe in, gated and signed bundles out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.parallel import Engine
from vera_edge.progress import Progress, silent
from vera_edge.releasing import rebuild as rebuilding
from vera_edge.releasing import run as releases
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.rebuild import Rebuilt
from vera_edge.releasing.run import Release
from vera_edge.releasing.work import Result

__all__ = ["Rebuilt", "Release", "ReleaseJob", "Result", "plan_release", "rebuild", "release"]


def release(
    recipe: StrPath,
    *,
    out: StrPath,
    resume: bool = True,
    engine: str = "local",
    workers: int = 1,
    ray_address: str | None = None,
    store: StrPath | None = None,
    progress: Progress = silent,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Release:
    """Make every bundle that a recipe describes, measure it, and publish those that pass their gates.

    Work that is done already, in this or another release, isn't done again. A job that fails or is stopped by
    its gate doesn't stop the others.

    Args:
        recipe: the recipe, TOML: bases, adapters, variants, limits; docs/release.md has every key.
        out: the folder that the bundles are published in.
        resume: take up what earlier runs finished; False makes everything again.
        engine: "local", or "ray" for a cluster, at ray_address.
        workers: processes at once, on this machine.
        ray_address: of the Ray cluster; None starts one on this machine.
        store: where finished work is kept between runs; None: the user's cache.
        progress: called with what is done, how much of it, and of how much (bundles).
        on_result: called with the Result of each bundle as it comes.

    Returns:
        A Release: `results` has for each bundle its state (built, unchanged, stopped, failed), mean KL in
        nats, retained effect from 0 to 1, bytes; `raise_when_incomplete()` raises when one isn't published.

    Raises:
        PlanError: the recipe is at fault; before any work.
        OutputError: `out` can't be written, or lies in an input.

    Example:
        >>> made = vera_edge.release("recipe.toml", out="released", store="store")
        >>> [result.state for result in made.results]
        ['built']
    """
    chosen = Engine(engine, workers, ray_address)
    places = (Path(recipe), Path(out), chosen, path_or_none(store))
    return releases.release(*places, progress, on_result, fresh=not resume)


def plan_release(recipe: StrPath, *, out: StrPath, store: StrPath | None = None) -> tuple[ReleaseJob, ...]:
    """Say which bundles a recipe describes, and touch nothing (`vera-edge release --dry-run`).

    Args:
        recipe, out, store: as in `release`.

    Returns:
        A Job for each bundle, in the order of the recipe.

    Raises:
        PlanError, OutputError: as `release`.

    Example:
        >>> jobs = vera_edge.plan_release("recipe.toml", out="released")
        >>> [job.variant.name for job in jobs]
        ['onnx-branch-fp32']
    """
    return releases.plan(Path(recipe), Path(out), path_or_none(store))[1]


def rebuild(bundle: StrPath, *, inputs: StrPath = ".", progress: Progress = silent) -> Rebuilt:
    """Make a released bundle again from its inputs, and compare the two byte for byte.

    Args:
        bundle: the released bundle's folder.
        inputs: the folder that the recipe's paths start from.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        A Rebuilt: `same`, the names of files that differ, and the tools whose versions do.

    Raises:
        BundleError: the bundle wasn't made by `release`, or isn't whole.
        MismatchError: the inputs aren't those it was made from.

    Example:
        >>> made = vera_edge.release("recipe.toml", out="released", store="store")
        >>> vera_edge.rebuild("released/a/onnx-branch-fp32").differing
        ()
    """
    return rebuilding.rebuild(Path(bundle), Path(inputs), progress)
