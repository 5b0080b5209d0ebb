"""Puts a released bundle together: the export, its evidence, and what says how it was made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vera_edge import bundle, chunks
from vera_edge.bundle import Manifest
from vera_edge.drift import windows
from vera_edge.files import canonical_json, write_atomic
from vera_edge.progress import Progress
from vera_edge.release import attestation, card
from vera_edge.release.attestation import Material
from vera_edge.release.cache import Store
from vera_edge.release.evidence import Evidence, golden
from vera_edge.release.inputs import Inputs, tools
from vera_edge.release.job import Job

EVIDENCE = "evidence"
RECIPE = "recipe.json"


def compose(
    job: Job,
    stage: Path,
    graph: Path,
    manifest: Manifest,
    inputs: Inputs,
    evidence: Evidence,
    key: str,
    progress: Progress,
) -> Manifest:
    """Put a bundle together in `stage`: the export, its evidence, and what says how it was made."""
    shutil.copytree(graph, stage, dirs_exist_ok=True)
    (stage / bundle.MANIFEST).unlink()
    name = f"{job.recipe.file.release.name}-{job.adapter.id}-{job.variant.name}"
    materials = (
        Material("base", job.adapter.base, inputs.base_digest, job.recipe.base(job.adapter.base).licence),
        Material("adapter", job.adapter.id, inputs.adapter.digest, job.adapter.licence),
    )
    parameters = {
        "key": key,
        "release": release_facts(job),
        "adapter": job.adapter.id,
        "base": job.adapter.base,
    }
    parameters |= {"variant": inputs.facts["variant"], "projections": inputs.facts["projections"]}
    parts = {
        f"{EVIDENCE}/drift.json": evidence.report,
        f"{EVIDENCE}/{RECIPE}": canonical_json(_own_recipe(job)),
        f"{EVIDENCE}/sbom.cdx.json": attestation.sbom(
            name, job.recipe.file.release.version, manifest.digest, materials, tools()
        ),
        f"{EVIDENCE}/provenance.json": attestation.provenance(
            name, manifest.digest, parameters, materials, tools()
        ),
        "README.md": card.render(job, manifest, evidence, materials, tools()),
    }
    for path, data in parts.items():
        write_atomic(stage / path, data)
    vectors = None
    if job.recipe.file.release.golden and manifest.kind == "decoder":
        found = golden(job, Store(job.store), graph, inputs.facts, progress)
        vectors = found.name
        shutil.copy(found, stage / vectors)
    names = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
    write_atomic(stage / chunks.INDEX, chunks.index(stage, names))
    facts = bundle.change(manifest, limits=evidence.limits, golden=vectors)
    return bundle.write(stage, facts)


def _own_recipe(job: Job) -> dict[str, Any]:
    """The part of the recipe that makes this bundle alone, without what is private to who made it."""

    def portable(path: str) -> str:
        return Path(path).name if Path(path).expanduser().is_absolute() else Path(path).as_posix()

    file, base = job.recipe.file, job.recipe.base(job.adapter.base)
    data = file.limits.data if file.limits.data == windows.BUILT_IN else portable(file.limits.data)
    text = job.variant.calibration
    calibration = text if text == windows.BUILT_IN else portable(text)
    own = file.model_copy(
        update={
            "base": (base.model_copy(update={"path": portable(base.path)}),),
            "adapter": (job.adapter.model_copy(update={"path": portable(job.adapter.path)}),),
            "variant": (job.variant.model_copy(update={"adapters": None, "calibration": calibration}),),
            "limits": file.limits.model_copy(update={"data": data}),
            "sign": None,
        }
    )
    return own.model_dump(mode="json", exclude_none=True)


def release_facts(job: Job) -> dict[str, Any]:
    release = job.recipe.file.release
    return release.model_dump() | {"licence": job.adapter.licence or ""}
