"""One bundle of a release, from its inputs to the folder that is published: export, measure, gate, compose.

Each stage's result lies in the store under the digest of all that determines it, so nothing is done twice:
adapters of one base share one branch graph, and a changed limit doesn't export again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vera_edge
from vera_edge import alignment, bundle, chunks, packing, provenance, signing, target
from vera_edge.adapter import Adapter
from vera_edge.bundle import Manifest
from vera_edge.checkpoint import Checkpoint
from vera_edge.drift import windows
from vera_edge.errors import MismatchError, VeraEdgeError
from vera_edge.files import canonical_json, read_json, staged_folder, write_atomic
from vera_edge.progress import Progress, silent
from vera_edge.projection import Projections
from vera_edge.release import attestation, card
from vera_edge.release.attestation import Material
from vera_edge.release.cache import Store, key_of
from vera_edge.release.evidence import Evidence, gather_evidence, golden
from vera_edge.release.job import Job
from vera_edge.weight_rounding import Rounding

ADAPTER_FILE = "adapters/default.onnx_adapter"
EVIDENCE = "evidence"
RECIPE = "recipe.json"
_TOOLS = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Result:
    """What became of a job.

    state: "built", "unchanged", "stopped" (a gate was not passed) or "failed" (an input is at fault).
    size: bytes of the bundle; kl: mean KL from the reference, nats; retained: share of the effect kept.
    """

    name: str
    state: str
    message: str = ""
    digest: str | None = None
    size: int | None = None
    kl: float | None = None
    retained: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object, without what isn't known."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


def tools() -> dict[str, str]:
    """Versions of everything whose change may change a bundle's bytes."""
    found = {"vera-edge": vera_edge.__version__}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(job: Job, progress: Progress = silent) -> Result:
    """Do one job. An input at fault or a gate not passed ends in a Result, not in an error."""
    try:
        return _run(job, progress)
    except VeraEdgeError as error:
        return Result(job.name, "failed", str(error))


def _run(job: Job, progress: Progress) -> Result:
    store = Store(job.store)
    inputs = _read_inputs(job, store)
    graph, manifest = _export(job, store, inputs, progress)
    evidence = gather_evidence(job, store, graph, inputs.facts, progress)
    target_folder = job.out / job.name
    if not evidence.passed:
        _reject(job, evidence)
        return _result(job, "stopped", "; ".join(evidence.breaches), evidence)
    key = key_of({"inputs": inputs.facts, "evidence": evidence.key, "release": _release_facts(job)})
    _forget(job.out / "rejected" / job.name)
    if (published := _published(target_folder, key, job)) is not None:
        return replace(_result(job, "unchanged", "", evidence), digest=published.digest, size=published.size)
    with staged_folder(target_folder, force=True) as stage:
        made = _compose(job, stage, graph, manifest, inputs, evidence, key, progress)
        if job.recipe.file.sign is not None:
            signing.sign(stage, job.recipe.path(job.recipe.file.sign.key))
    return replace(_result(job, "built", "", evidence), digest=made.digest, size=made.size)


@dataclass(frozen=True)
class _Inputs:
    """Base and adapter as read, and the facts that determine the export, as JSON."""

    checkpoint: Checkpoint
    adapter: Adapter
    projections: Projections
    base_digest: str
    facts: dict[str, Any]


def _read_inputs(job: Job, store: Store) -> _Inputs:
    base_path = job.recipe.path(job.recipe.base(job.adapter.base).path)
    checkpoint = Checkpoint.open(base_path)
    adapter = alignment.read(job.recipe.path(job.adapter.path), checkpoint)
    found = provenance.resolve(adapter, checkpoint, job.adapter.projection_dtype)
    base_digest = store.folder_digest(base_path)
    facts = {
        "calibration": windows.read_text(_calibration(job)).sha256,
        "base": base_digest,
        "adapter": adapter.digest,
        "adapter_name": job.adapter.id,
        "projections": found.projections.digest,
        "variant": job.variant.model_dump(exclude={"id", "adapters", "calibration"}, exclude_none=True),
        "tools": tools(),
    }
    return _Inputs(checkpoint, adapter, found.projections, base_digest, facts)


def _export(job: Job, store: Store, inputs: _Inputs, progress: Progress) -> tuple[Path, Manifest]:
    """The exported folder with this job's adapter in it, and its manifest."""
    if job.variant.mode == "merged":
        folder, _ = store.build(inputs.facts | {"stage": "export"}, lambda stage: _call(job, stage, progress))
        return folder, bundle.read(folder)
    # The graph of a branch is the same for every adapter that touches the same layers.
    shared_facts = {
        key: value for key, value in inputs.facts.items() if key not in ("adapter", "adapter_name")
    }
    shared_facts |= {"stage": "graph", "modules": sorted(inputs.adapter.vectors)}
    graph, _ = store.build(shared_facts, lambda stage: _call(job, stage, progress))
    folder, _ = store.build(inputs.facts | {"stage": "export"}, lambda stage: _swap_in(graph, stage, inputs))
    return folder, bundle.read(folder)


def _call(job: Job, stage: Path, progress: Progress) -> None:
    options = {}
    if job.variant.projections_dtype is not None:
        options["projections"] = job.variant.projections_dtype
    target.export(
        base=job.recipe.path(job.recipe.base(job.adapter.base).path),
        adapter_paths=[(job.recipe.path(job.adapter.path), 1.0)],
        out=stage,
        target=job.variant.target,
        mode=job.variant.mode,
        weights=job.variant.weights,
        options=options,
        projection_dtype=job.adapter.projection_dtype,
        progress=progress,
        rounding=Rounding(job.variant.method, _calibration(job), any_adapter=True),
    )


def _calibration(job: Job) -> str:
    """The text that weights are calibrated on, as `Rounding` takes it."""
    text = job.variant.calibration
    return text if text == windows.BUILT_IN else str(job.recipe.path(text))


def _swap_in(graph: Path, stage: Path, inputs: _Inputs) -> None:
    """Copy the shared graph and put this adapter's vectors in the place of those it was exported with."""
    shutil.copytree(graph, stage, dirs_exist_ok=True)
    manifest = bundle.read(stage)
    shutil.rmtree(stage / "adapters")
    packing.pack(inputs.adapter, manifest, stage / ADAPTER_FILE, spec=inputs.projections.spec)
    entry = {"file": ADAPTER_FILE, "digest": inputs.adapter.digest, "weight": 1.0}
    plan = dict(manifest.plan or {})
    if "adapters" in plan:
        plan["adapters"] = [{"digest": inputs.adapter.digest, "weight": 1.0}]
    bundle.write(
        stage, bundle.change(manifest, adapters={"default": entry}, default_adapter="default", plan=plan)
    )


def _compose(
    job: Job,
    stage: Path,
    graph: Path,
    manifest: Manifest,
    inputs: _Inputs,
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
        "release": _release_facts(job),
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


def check_inputs(job: Job, digests: Mapping[str, str]) -> None:
    """Raise MismatchError unless base and adapter have these digests ("base" and "adapter")."""
    inputs = _read_inputs(job, Store(job.store))
    for kind, found in (("base", inputs.base_digest), ("adapter", inputs.adapter.digest)):
        if digests.get(kind) != found:
            raise MismatchError(
                f"the {kind} here isn't the one that {job.name} was made from; give its inputs"
            )


def _release_facts(job: Job) -> dict[str, Any]:
    release = job.recipe.file.release
    return release.model_dump() | {"licence": job.adapter.licence or ""}


def _published(folder: Path, key: str, job: Job) -> Manifest | None:
    """The manifest of `folder` when it is this very bundle, whole and signed as asked."""
    try:
        statement = read_json(folder / EVIDENCE / "provenance.json", VeraEdgeError)
        if statement["predicate"]["buildDefinition"]["externalParameters"]["key"] != key:
            return None
        manifest = bundle.verify(folder, deep=False)
        sign = job.recipe.file.sign
        if sign is not None:
            keys = job.recipe.path(sign.public_key) if sign.public_key else None
            if not (folder / bundle.SIGNATURE).is_file():
                return None
            signing.check(folder, signing.Trust(keys, required=keys is not None))
    except (VeraEdgeError, KeyError, TypeError):
        return None
    return manifest


def _reject(job: Job, evidence: Evidence) -> None:
    """Keep the evidence of a bundle that a gate stopped. One published before stays: it passed its gate."""
    folder = job.out / "rejected" / job.name
    write_atomic(folder / "drift.json", evidence.report)
    write_atomic(folder / "breaches.json", canonical_json({"breaches": list(evidence.breaches)}))


def _forget(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _result(job: Job, state: str, message: str, evidence: Evidence) -> Result:
    return Result(job.name, state, message, kl=evidence.kl, retained=evidence.retained)
