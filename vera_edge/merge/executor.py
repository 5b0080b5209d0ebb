"""Performs a merge plan: reads the base piece by piece and writes an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vera_edge import formats, side_files
from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.engine import Engine
from vera_edge.errors import OutputError, PlanError
from vera_edge.files import canonical_json, check_output, write_atomic
from vera_edge.merge import advice, card
from vera_edge.merge.config import merged_config
from vera_edge.merge.cutting import cut
from vera_edge.merge.delta import Delta
from vera_edge.merge.journal import Done
from vera_edge.merge.memory import ONE_PROCESS, Resources, allowed_workers
from vera_edge.merge.report import LayerReport, MergeReport
from vera_edge.merge.stage import Stage, files_of, opened, tidy
from vera_edge.merge.units import merge_rows
from vera_edge.merge.work import Job, do_unit, is_there, key_of
from vera_edge.plan import Plan, check_made_for
from vera_edge.progress import Progress, silent
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.shards import MAX_SHARD_BYTES, ShardWriter
from vera_edge.tensors import Float32

RECORD = "vera_edge_merge.json"
WHAT = "merging"  # in progress, whose unit is a byte


def merged_weight(
    checkpoint: Checkpoint,
    module: str,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
) -> Float32:
    """One linear's weight with the adapters' deltas added, exact base values, float32 (out, in)."""
    base = checkpoint.load(module)
    delta = Delta(module, base.shape[1], adapters, projections)
    return merge_rows(module, base, None if delta.is_zero else delta)


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
    out: Path,
    progress: Progress = silent,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    notes: Sequence[str] = (),
    requantized: Mapping[str, Codes] | None = None,
    resources: Resources = ONE_PROCESS,
) -> MergeReport:
    """Perform `plan` and write the merged model to `out`, whole or not at all.

    adapters: those the plan was made for, with their weights. notes: sentences for the report.
    requantized: weights that were rounded elsewhere, merged, by module; the others are rounded to nearest.
    resources: where it runs; the bytes don't depend on it. What a run that was killed has finished isn't done
    again, if it's the same merge (`work.key_of`) and the files still hold it.
    Raises MismatchError when the plan was made for other inputs, PlanError when it isn't a merge or can't fit
    in memory, OutputError when `out` can't be written, VeraEdgeError when workers keep dying.
    """
    check_plan(plan, checkpoint, adapters, projections)
    tidy(out)
    check_output(out, force)
    codes = requantized or {}
    cut(plan, checkpoint, adapters, projections, codes)  # raises before the base is read for its digest
    key = key_of(plan, checkpoint, codes, max_shard_bytes)
    folder = files_of(out, key)
    job = Job(key, plan, checkpoint, adapters, projections, codes, folder, max_shard_bytes)
    workers = allowed_workers(job, resources.in_flight, resources.max_memory)
    config = merged_config(plan, checkpoint, job.untied)
    with opened(out, key) as stage:
        layers = _write_tensors(job, stage, resources.engine, workers, progress)
        report = _report(plan, checkpoint, adapters, projections, out, layers, notes, bool(requantized))
        _write_beside(stage.files, report, config, checkpoint, plan)
        size = sum(path.stat().st_size for path in stage.files.rglob("*") if path.is_file())
        stage.commit()
    return replace(report, size=size)


def check_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
) -> None:
    """Raise unless `plan` is a merge of exactly these inputs into formats that can be written."""
    if plan.mode != "merged":
        raise PlanError(
            "this plan keeps the adapter as a side-branch, which a checkpoint can't hold; export it"
        )
    check_made_for(plan, checkpoint, adapters, projections)
    for step in plan.steps:
        # Where a plan also decides on the head, it's one of a graph, whose integers are blocks.
        if step.result in ("int4", "int8") and "head" in plan.options:
            raise PlanError(
                f"this plan stores {step.module} as {step.result} blocks, which only a graph holds; export it"
            )
        formats.get(step.result)


def _write_tensors(
    job: Job, stage: Stage, engine: Engine, workers: int | None, progress: Progress
) -> tuple[LayerReport, ...]:
    _keep_only_shards(job, stage)
    _check_space(job, stage)
    with ShardWriter(job.shards) as writer:
        done = _take_up(job, stage, progress)
        written = sum(job.sizes[number] for number in done)
        left = [number for number in range(len(job.units)) if number not in done]
        progress(WHAT, written, writer.total)
        for _, one in engine.map_with(do_unit, job, left, workers):
            stage.journal.add(one)
            done[one.unit] = one
            written += job.sizes[one.unit]
            progress(WHAT, written, writer.total)
        for number in done:
            for name in job.units[number].layout:
                writer.claim(name)
    layers = [one.layer for one in done.values() if one.layer is not None]
    return tuple(sorted(layers, key=lambda layer: layer.module))


def _keep_only_shards(job: Job, stage: Stage) -> None:
    """Remove what a run that was killed near its end left beside the shards, half-written files among it."""
    shards = set(job.shards.files.values())
    for path in stage.files.iterdir():
        if path.name not in shards:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(job: Job, stage: Stage) -> None:
    free = shutil.disk_usage(stage.files).free
    held = sum(path.stat().st_blocks * 512 for path in stage.files.iterdir())  # by an earlier run
    if free + held < job.shards.total:
        raise OutputError(
            f"the merged model takes {job.shards.total:,} bytes and the disk of {stage.target.parent} has "
            f"{free:,} left; free some or choose a smaller format with --to"
        )


def _take_up(job: Job, stage: Stage, progress: Progress) -> dict[int, Done]:
    """What earlier runs finished, as far as the files hold it."""
    said, found = sorted(stage.journal.done.items()), {}
    for number, (unit, done) in enumerate(said, 1):
        if is_there(job, done):
            found[unit] = done
        progress("verifying what was merged before", number, len(said))
    return found


def _report(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
    out: Path,
    layers: tuple[LayerReport, ...],
    notes: Sequence[str],
    calibrated: bool,
) -> MergeReport:
    changed = {layer.module for layer in layers}
    report = MergeReport(
        folder=out,
        weights=plan.weights,
        layers=layers,
        results=dict(sorted(Counter(step.result for step in plan.steps).items())),
        size=0,
        base_digest=checkpoint.digest,
        adapters=tuple((adapter.name, adapter.digest, float(weight)) for adapter, weight in adapters),
        projection={**projections.spec.to_dict(), "digest": projections.digest},
        notes=tuple(notes),
        unchanged=tuple(
            step.module for step in plan.steps if step.action == "merge" and step.module not in changed
        ),
    )
    if calibrated:
        # Compensated rounding spends weight-space error to save output error: shares of the delta say little.
        return report
    return replace(report, warning=advice.warning(report, checkpoint, adapters, projections))


def _write_beside(
    stage: Path, report: MergeReport, config: dict[str, object], checkpoint: Checkpoint, plan: Plan
) -> None:
    """Everything but the weights."""
    write_atomic(stage / "config.json", canonical_json(config))
    side_files.copy(checkpoint.path, stage)
    base_name = str(checkpoint.config.get("_name_or_path") or checkpoint.path.resolve().name)
    write_atomic(stage / "README.md", card.text(report, base_name, config).encode())
    record = {"plan": plan.to_dict(), "report": report.facts()}
    write_atomic(stage / RECORD, canonical_json(record))
