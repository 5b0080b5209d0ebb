"""Makes a released bundle again from what it says of itself, and compares the two byte for byte."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vera_edge.bundle import contents as bundle
from vera_edge.errors import BundleError, MismatchError, VeraEdgeError
from vera_edge.progress import Progress, silent
from vera_edge.releasing import inputs as inputs_of
from vera_edge.releasing import work
from vera_edge.releasing.compose import EVIDENCE, RECIPE
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.recipe import Recipe, RecipeFile, leaves
from vera_edge.storage.json_text import read_json
from vera_edge.text.mixture import split


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild found. `differing`: names of files that aren't the same, the signature aside.

    `tools`: tool -> (version it was made with, version here), where they differ.
    """

    digest: str
    differing: tuple[str, ...]
    tools: dict[str, tuple[str | None, str | None]]

    @property
    def same(self) -> bool:
        return not self.differing

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"same": self.same, "differing": list(self.differing), "digest": self.digest}


def rebuild(folder: Path, inputs: Path, progress: Progress = silent) -> Rebuilt:
    """Make the bundle in `folder` again in a temporary folder, from nothing but its inputs.

    inputs: the folder that the recipe's paths start from. Raises BundleError when the bundle wasn't made by
    `vera-edge release` or isn't whole, MismatchError when the inputs aren't those it was made from.
    """
    old = bundle.verify(folder)
    recipe = _recipe(folder, inputs)
    statement = read_json(folder / EVIDENCE / "provenance.json", BundleError)
    with tempfile.TemporaryDirectory(prefix="vera-edge-rebuild-") as name:
        place = Path(name)
        adapter, variant = recipe.jobs[0]
        job = ReleaseJob(recipe, adapter, variant, place / "out", place / "store")
        inputs_of.check(job, _materials(statement, folder))
        try:
            result = work.run_alone(job, progress)
        except VeraEdgeError as cause:
            raise VeraEdgeError(f"{folder} can't be made again: {cause}") from None
        if result.state == "stopped":
            raise VeraEdgeError(f"{folder} can't be made again: {result.message}")
        new = bundle.read(job.out / job.name)
    names = sorted(old.files.keys() | new.files.keys())
    differing = tuple(name for name in names if old.files.get(name) != new.files.get(name))
    tools = {
        tool: (old.tools.get(tool), new.tools.get(tool))
        for tool in sorted(old.tools.keys() | new.tools.keys())
        if old.tools.get(tool) != new.tools.get(tool)
    }
    return Rebuilt(new.digest, differing, tools)


def _recipe(folder: Path, inputs: Path) -> Recipe:
    path = folder / EVIDENCE / RECIPE
    if not path.is_file():
        raise BundleError(f"{folder} carries no recipe; only what `vera-edge release` made can be made again")
    try:
        file = RecipeFile.model_validate(read_json(path, BundleError))
    except ValidationError:
        raise BundleError(f"{path} isn't a recipe that this vera-edge understands; update it") from None
    if len(file.base) != 1 or len(file.adapter) != 1 or len(file.variant) != 1:
        raise BundleError(f"{path} describes more than one bundle; it was changed")
    # What was released keeps these to itself, and a stranger's bundle doesn't say what is read here.
    (base,), (adapter,), (variant,) = file.base, file.adapter, file.variant
    texts = (split(word)[0] for word in variant.texts)
    paths = (base.path, *adapter.paths, variant.plan, *texts, file.limits.data)
    if file.sign is not None or any(leaves(one) for one in paths if one is not None):
        raise BundleError(f"{path} names a key, or files outside of the inputs; it was changed")
    return Recipe(file, inputs.absolute(), confined=True)


def _materials(statement: dict[str, Any], folder: Path) -> dict[str, str]:
    try:
        listed = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        return {entry["name"].partition(":")[0]: entry["digest"]["sha256"] for entry in listed}
    except (KeyError, TypeError, AttributeError):
        raise MismatchError(f"the provenance in {folder} doesn't name its inputs; it was changed") from None
