"""One bundle of a release, from its inputs to the folder that is published: export, measure, gate, compose.

Each stage's result lies in the store under the digest of all that determines it, so nothing is done twice:
adapters of one base share one branch graph, and a changed limit doesn't export again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vera_edge import bundle, packing, signing, target
from vera_edge.bundle import Manifest
from vera_edge.errors import VeraEdgeError
from vera_edge.files import canonical_json, read_json, staged_folder, write_atomic
from vera_edge.progress import Progress, silent
from vera_edge.release import inputs as inputs_of
from vera_edge.release.cache import Store, key_of
from vera_edge.release.compose import EVIDENCE, compose, release_facts
from vera_edge.release.evidence import Evidence, gather_evidence
from vera_edge.release.inputs import Inputs, calibration_text
from vera_edge.release.job import Job
from vera_edge.weight_rounding import Rounding

ADAPTER_FILE = "adapters/default.onnx_adapter"


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


def run(job: Job, progress: Progress = silent) -> Result:
    """Do one job. An input at fault or a gate not passed ends in a Result, not in an error."""
    try:
        return _run(job, progress)
    except VeraEdgeError as error:
        return Result(job.name, "failed", str(error))


def _run(job: Job, progress: Progress) -> Result:
    store = Store(job.store)
    inputs = inputs_of.read(job, store)
    graph, manifest = _export(job, store, inputs, progress)
    evidence = gather_evidence(job, store, graph, inputs.facts, progress)
    target_folder = job.out / job.name
    if not evidence.passed:
        _reject(job, evidence)
        return _result(job, "stopped", "; ".join(evidence.breaches), evidence)
    key = key_of({"inputs": inputs.facts, "evidence": evidence.key, "release": release_facts(job)})
    _forget(job.out / "rejected" / job.name)
    if (published := _published(target_folder, key, job)) is not None:
        return replace(_result(job, "unchanged", "", evidence), digest=published.digest, size=published.size)
    with staged_folder(target_folder, force=True) as stage:
        made = compose(job, stage, graph, manifest, inputs, evidence, key, progress)
        if job.recipe.file.sign is not None:
            signing.sign(stage, job.recipe.path(job.recipe.file.sign.key))
    return replace(_result(job, "built", "", evidence), digest=made.digest, size=made.size)


def _export(job: Job, store: Store, inputs: Inputs, progress: Progress) -> tuple[Path, Manifest]:
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
        rounding=Rounding(job.variant.method, calibration_text(job), any_adapter=True),
    )


def _swap_in(graph: Path, stage: Path, inputs: Inputs) -> None:
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
