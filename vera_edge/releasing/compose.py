"""Puts a released bundle together: the export, its evidence, and what says how it was made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import FileEntry, Manifest
from vera_edge.device.check.golden import FILE as GOLDEN
from vera_edge.errors import BundleError
from vera_edge.releasing import attestation, card
from vera_edge.releasing.attestation import Material
from vera_edge.releasing.cache import Store, publish
from vera_edge.releasing.evidence import REPORT, Evidence
from vera_edge.releasing.inputs import ReleaseInputs, tools
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.recipe import leaves
from vera_edge.storage.json_text import canonical_json
from vera_edge.text.mixture import split

EVIDENCE = "evidence"
PROVENANCE = "provenance.json"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Parts:
    """What a bundle is put together from. exported: the export's manifest. golden: the file of answers.

    key: names all that determined the bundle.
    """

    exported: Manifest
    inputs: ReleaseInputs
    evidence: Evidence
    golden: Path | None
    key: str


def compose(job: ReleaseJob, stage: Path, parts: Parts, store: Store) -> Manifest:
    """Put a bundle together in `stage`, its manifest last. Raises BundleError when the store is damaged."""
    exported, evidence = parts.exported, parts.evidence
    for name, entry in exported.files.items():
        _take(exported.folder / name, stage / name, entry)
    written = {f"{EVIDENCE}/{name}": data for name, data in evidence.plots.items()}
    written |= {f"{EVIDENCE}/{REPORT}": evidence.report, **_statements(job, parts)}
    if parts.golden is not None:
        written[GOLDEN] = parts.golden.read_bytes()
    for path, data in written.items():
        (stage / path).parent.mkdir(exist_ok=True)
        with (stage / path).open("xb") as stream:  # never into a file that the store has too
            stream.write(data)
    _index_chunks(stage, exported, list(written), store)
    facts = bundle.change(exported, limits=evidence.limits, golden=None if parts.golden is None else GOLDEN)
    return bundle.write(stage, facts, known=exported.files)


def _take(source: Path, place: Path, entry: FileEntry) -> None:
    """Bring a file of the store into a bundle, and see on the way that it is what was exported."""
    if publish(source, place) != entry.sha256:
        raise BundleError(f"{source} was damaged after it was made; run again with --fresh")


def _index_chunks(stage: Path, exported: Manifest, written: list[str], store: Store) -> None:
    """Write the index of chunks. Those of an exported file are found once for all bundles that hold it."""
    found = {}
    for name, entry in exported.files.items():

        def make(folder: Path, path: Path = stage / name) -> None:
            (folder / chunks.INDEX).write_bytes(chunks.index({"file": chunks.split(path)}))

        kept, _ = store.build({"sha256": entry.sha256, "stage": "chunks"}, make)
        found[name] = chunks.read_index(kept / chunks.INDEX)["file"]
    found |= {name: tuple(chunks.split(stage / name)) for name in written}
    (stage / chunks.INDEX).write_bytes(chunks.index(found))


def _statements(job: ReleaseJob, parts: Parts) -> dict[str, bytes]:
    """What a bundle says of itself, by file: recipe, bill of materials, provenance, model card."""
    inputs, digest = parts.inputs, parts.exported.digest
    release = job.recipe.file.release
    name = f"{release.name}-{job.adapter.id}-{job.variant.name}"
    materials = (
        Material("base", job.adapter.base, inputs.base_digest, job.recipe.base(job.adapter.base).licence),
        Material("adapter", job.adapter.id, inputs.adapter.digest, job.adapter.licence),
    )
    parameters = {
        "key": parts.key,
        "release": release.model_dump() | {"licence": job.adapter.licence or ""},
        "adapter": job.adapter.id,
        "base": job.adapter.base,
        "variant": inputs.facts["variant"],
        "projections": inputs.facts["projections"],
    }
    if inputs.trained.combination is not None:
        parameters["combination"] = inputs.trained.combination
    if "trained_as" in inputs.facts:
        parameters["trained_as"] = inputs.facts["trained_as"]
    made_with = tools(job.variant.target)
    return {
        f"{EVIDENCE}/{RECIPE}": canonical_json(own_recipe(job)),
        f"{EVIDENCE}/sbom.cdx.json": attestation.sbom(name, release.version, digest, materials, made_with),
        f"{EVIDENCE}/{PROVENANCE}": attestation.provenance(name, digest, parameters, materials, made_with),
        "README.md": card.render(job, parts.exported, parts.evidence, materials, made_with),
    }


def own_recipe(job: ReleaseJob) -> dict[str, Any]:
    """The part of the recipe that makes this bundle alone, without what is private to who made it.

    What lies outside of the recipe's folder is named by its last part: a rebuild reads nothing out there.
    """

    def portable(path: str) -> str:
        inside = os.path.normpath(path) if not path.startswith("~") else path
        return (job.recipe.folder / path).resolve().name if leaves(inside) else Path(inside).as_posix()

    file, base = job.recipe.file, job.recipe.base(job.adapter.base)
    texts = [split(word) for word in job.variant.texts]
    calibration = tuple(portable(name) + share for name, share in texts)
    variant = {"adapters": None, "calibration": calibration if len(texts) > 1 else calibration[0]}
    if job.variant.plan is not None:
        variant["plan"] = portable(job.variant.plan)
    parts, path = job.adapter.combine or (), job.adapter.path
    combined = tuple(part.model_copy(update={"path": portable(part.path)}) for part in parts)
    adapter = {"combine": combined} if path is None else {"path": portable(path)}
    own = file.model_copy(
        update={
            "base": (base.model_copy(update={"path": portable(base.path)}),),
            "adapter": (job.adapter.model_copy(update=adapter),),
            "variant": (job.variant.model_copy(update=variant),),
            "limits": file.limits.model_copy(update={"data": portable(file.limits.data)}),
            "sign": None,
        }
    )
    return own.model_dump(mode="json", exclude_none=True)
