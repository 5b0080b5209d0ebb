"""The whole of `vera-edge release`: read the recipe, do every job, and say what became of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from vera_edge.errors import DriftExceeded, OutputError, VeraEdgeError, first_of
from vera_edge.measuring.junit import State, TestCase, document
from vera_edge.parallel import Engine
from vera_edge.progress import Progress, silent
from vera_edge.releasing import recipe as recipes
from vera_edge.releasing import work
from vera_edge.releasing.cache import default_root, only_one
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.recipe import Recipe
from vera_edge.releasing.work import Result
from vera_edge.storage.files import make_folder, sweep, write_atomic
from vera_edge.storage.json_text import canonical_json

INDEX = "release.json"
SUMMARY = "SUMMARY.md"
JUNIT = "junit.xml"


@dataclass(frozen=True)
class Release:
    """A release as it came out. `results` are in the order of the recipe."""

    name: str
    version: str
    out: Path
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """The release as a JSON object; which run made a bundle isn't part of it."""
        bundles = [
            result.to_dict() | ({"state": "ok"} if result.state in ("built", "unchanged") else {})
            for result in self.results
        ]
        return {"format": 1, "name": self.name, "version": self.version, "bundles": bundles}

    def summary(self) -> str:
        """The release as a Markdown table, for a pull request or a job's summary page."""
        return summary(self)

    def raise_when_incomplete(self) -> None:
        """Raise VeraEdgeError when a job failed, DriftExceeded when a gate stopped one."""
        stopped = [result.name for result in self.results if result.state == "stopped"]
        failed = [result.name for result in self.results if result.state == "failed"]
        if stopped:
            raise DriftExceeded(
                f"{len(stopped)} of {len(self.results)} bundles were stopped: {first_of(stopped)}"
            )
        if failed:
            raise VeraEdgeError(f"{len(failed)} of {len(self.results)} bundles failed: {first_of(failed)}")


def plan(
    recipe_path: Path, out: Path, store: Path | None = None, fresh: bool = False
) -> tuple[Recipe, tuple[ReleaseJob, ...]]:
    """The jobs of a recipe, in its order; touches nothing.

    Raises PlanError when the recipe is at fault, OutputError when it would be published into its own inputs.
    """
    recipe = recipes.read(recipe_path)
    root = (store or default_root()).absolute()
    run = uuid4().hex if fresh else None
    jobs = tuple(
        ReleaseJob(recipe, adapter, variant, out.absolute(), root, rank, run)
        for rank, (adapter, variant) in enumerate(recipe.jobs)
    )
    _check_apart(recipe, jobs, out)
    return recipe, jobs


def _check_apart(recipe: Recipe, jobs: tuple[ReleaseJob, ...], out: Path) -> None:
    """Raise OutputError when what is published would come to lie in an input, or in its place."""
    paths = [base.path for base in recipe.file.base]
    paths += [path for adapter in recipe.file.adapter for path in adapter.paths]
    inputs = [recipe.path(path).resolve() for path in paths]
    places = [(out / job.name).resolve() for job in jobs]
    for source in inputs:
        if out.resolve().is_relative_to(source) or any(source.is_relative_to(place) for place in places):
            raise OutputError(f"publishing in {out} would change {source}, an input; choose another -o")


def release(
    recipe_path: Path,
    out: Path,
    engine: Engine | None = None,
    store: Path | None = None,
    progress: Progress = silent,
    on_result: Callable[[Result], None] = lambda result: None,
    fresh: bool = False,
) -> Release:
    """Make every bundle of a recipe under `out`, and the release's index, summary and JUnit file.

    A job that fails or is stopped by its gate doesn't stop the others. What earlier runs finished is taken
    up, unless this is a `fresh` one. Raises PlanError before any work when the recipe is at fault,
    OutputError when `out` can't be written.
    """
    recipe, jobs = plan(recipe_path, out, store, fresh)
    make_folder(out)
    results: dict[int, Result] = {}
    for group in _in_turn(jobs):
        for done, result in (engine or Engine()).map(work.run, group):
            results[group[done].rank] = result
            on_result(result)
            progress("releasing", len(results), len(jobs))
    made = tuple(results[job.rank] for job in jobs)
    release = Release(recipe.file.release.name, recipe.file.release.version, out, made)
    _write_index(release)
    return release


def _write_index(release: Release) -> None:
    """Write what lists the release, where it isn't there already: a finished release may be read-only."""
    files = {
        INDEX: canonical_json(release.to_dict()),
        SUMMARY: summary(release).encode(),
        JUNIT: junit(release),
    }
    for path, data in ((release.out / name, data) for name, data in files.items()):
        if path.is_file() and path.read_bytes() == data:
            continue
        with only_one(release.out / work.LOCKS / path.name):
            sweep(path)
            write_atomic(path, data)


def _in_turn(jobs: tuple[ReleaseJob, ...]) -> list[list[ReleaseJob]]:
    """Jobs in two waves: the first of every base and variant makes what the others share."""
    first: dict[tuple[str, str], ReleaseJob] = {}
    for job in jobs:
        first.setdefault((job.adapter.base, job.variant.name), job)
    ahead = list(first.values())
    return [wave for wave in (ahead, [job for job in jobs if job not in ahead]) if wave]


def summary(release: Release) -> str:
    """The release as a Markdown table, for a pull request or a job's summary page."""
    lines = [
        f"# {release.name} {release.version}",
        "",
        "| bundle | state | mean KL | effect kept | bytes |",
        "|---|---|---|---|---|",
    ]
    for result in release.results:
        kl = "" if result.kl is None else f"{result.kl:.3g}"
        retained = "" if result.retained is None else f"{result.retained:.1%}"
        size = "" if result.size is None else str(result.size)
        # Whether this run or an earlier one made it isn't part of what the release is.
        state = "ok" if result.state in ("built", "unchanged") else result.state
        lines.append(f"| {result.name} | {state} | {kl} | {retained} | {size} |")
    faults = [f"- {result.name}: {result.message}" for result in release.results if result.message]
    return "\n".join([*lines, "", *faults, *([""] if faults else [])])


def junit(release: Release) -> bytes:
    """The release as JUnit XML: a test case a bundle, a failure where a gate stopped it."""
    states: dict[str, State] = {"stopped": "failure", "failed": "error"}
    cases = [
        TestCase(
            result.name, states.get(result.state, "passed"), result.message if result.state in states else ""
        )
        for result in release.results
    ]
    return document("vera-edge release", f"{release.name} {release.version}", release.name, cases)
