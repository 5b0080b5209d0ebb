"""The exported folder of a job: planned, exported, and kept in the store.

Adapters of one base share one branch graph; what differs from one to the next is their vectors and the
manifest. Within the store the shared files are one file each, by hard links.
"""

from __future__ import annotations

from pathlib import Path

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.bundle.manifest import GGUF
from vera_edge.exporting import gguf_adapter, target
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting.branch_form import forms_of, kinds_of
from vera_edge.exporting.branch_inputs import rank_of
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import Plan
from vera_edge.progress import Progress
from vera_edge.releasing.cache import Store, link
from vera_edge.releasing.inputs import ReleaseInputs
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.variant import PLAN
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json

_NAME = "default"
_PLAN_FILE = "plan.json"


def export(job: ReleaseJob, store: Store, inputs: ReleaseInputs, progress: Progress) -> Manifest:
    """Export a job's base and adapter, or find it exported; `folder` of the manifest says where."""
    facts = inputs.facts | {"stage": "export"}
    if not job.variant.shares_graph:
        plan = _plan(job, store, inputs, progress)
        folder, _ = store.build(facts, lambda stage: _export(job, inputs, stage, progress, plan))
        return bundle.read(folder)
    # The graph of a branch is the same for every adapter that touches the same layers.
    shared = {key: value for key, value in facts.items() if key != "adapter"}
    shared |= {"stage": "graph", "modules": sorted(inputs.adapter.vectors)}
    if not inputs.adapter.is_vera:  # whose pairs have inputs of the graph to themselves
        kinds = {kind: sorted(modules) for kind, modules in kinds_of(inputs.adapter).items()}
        rank = rank_of(forms_of(inputs.adapter, inputs.checkpoint))
        shared |= {"method": inputs.adapter.method, "rank": rank, "kinds": kinds}
    graph, _ = store.build(shared, lambda stage: _export(job, inputs, stage, progress, None))
    folder, _ = store.build(facts, lambda stage: _swap_in(graph, stage, inputs))
    return bundle.read(folder)


def _plan(job: ReleaseJob, store: Store, inputs: ReleaseInputs, progress: Progress) -> Plan | None:
    """The recipe's plan, read or searched for; None when the variant has no plan."""
    variant = job.variant
    if variant.weights != PLAN:
        return None
    if variant.plan is not None:
        return plans.read(job.recipe.path(variant.plan))

    def make(stage: Path) -> None:
        from vera_edge.precision.choose import choose  # imports torch

        adapters = [(inputs.trained.path, 1.0)]
        base = job.recipe.base(job.adapter.base)
        request = variant.request(job.recipe.mixture(variant.calibration))
        found = choose(
            job.recipe.path(base.path),
            adapters,
            request,
            stage,
            inputs.trained.rounding,
            progress,
            trained_as=base.spec,
        )
        write_atomic(stage / _PLAN_FILE, canonical_json(found.plan.to_dict()))

    folder, _ = store.build(inputs.facts | {"stage": "plan"}, make)
    return plans.read(folder / _PLAN_FILE)


def _export(
    job: ReleaseJob, inputs: ReleaseInputs, stage: Path, progress: Progress, plan: Plan | None
) -> None:
    variant, base = job.variant, job.recipe.base(job.adapter.base)
    target.export(
        base=job.recipe.path(base.path),
        adapter_paths=[(inputs.trained.path, 1.0)],
        out=stage,
        target=variant.target,
        mode=variant.mode,
        weights=variant.weights,
        options=variant.options,
        projection_rounding=inputs.trained.rounding,
        progress=progress,
        rounding=Rounding(
            variant.method,
            job.recipe.mixture(variant.calibration),
            any_adapter=True,
            effort=variant.effort,
            device=variant.compute_device or Rounding.device,
        ),
        plan=plan,
        trained_as=base.spec,
    )
    manifest = bundle.read(stage)
    # A merged adapter is listed by its folder's name, which may be another one elsewhere.
    if manifest.mode == "merged":
        (entry,) = manifest.adapters.values()
        bundle.write(stage, bundle.change(manifest, adapters={_NAME: entry}), known=manifest.files)


def _swap_in(graph: Path, stage: Path, inputs: ReleaseInputs) -> None:
    """The shared graph with this adapter's vectors in the place of those it was exported with."""
    manifest = bundle.read(graph)
    same = {name: entry for name, entry in manifest.files.items() if not name.startswith("adapters/")}
    for name in same:
        link(graph / name, stage / name)
    (stage / "adapters").mkdir(parents=True, exist_ok=True)
    file = f"adapters/{_NAME}{GGUF if manifest.is_gguf else '.onnx_adapter'}"
    if manifest.is_gguf:
        gguf_adapter.pack(inputs.model, manifest, stage / file, _NAME)
    else:
        packing.pack(inputs.adapter, manifest, stage / file, spec=inputs.spec, base=inputs.checkpoint)
    entry = {"file": file, "digest": inputs.adapter.digest, "weight": 1.0}
    plan = dict(manifest.plan or {})
    if "adapters" in plan:
        plan["adapters"] = [{"digest": inputs.adapter.digest, "weight": 1.0}]
    facts = bundle.change(manifest, adapters={_NAME: entry}, default_adapter=_NAME, plan=plan)
    bundle.write(stage, facts, known=same)
