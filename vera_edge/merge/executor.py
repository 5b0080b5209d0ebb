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
from vera_edge.errors import OutputError, PlanError
from vera_edge.files import canonical_json, check_output, staged_folder, write_atomic
from vera_edge.merge import advice, card
from vera_edge.merge.config import merged_config
from vera_edge.merge.cutting import cut
from vera_edge.merge.delta import Delta
from vera_edge.merge.report import LayerReport, MergeReport
from vera_edge.merge.units import Unit, merge_rows
from vera_edge.plan import Plan, check_made_for
from vera_edge.progress import Progress, silent
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.shards import MAX_SHARD_BYTES, Layout, ShardWriter
from vera_edge.tensors import Float32

RECORD = "vera_edge_merge.json"


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
) -> MergeReport:
    """Perform `plan` and write the merged model to `out`, whole or not at all.

    adapters: those the plan was made for, with their weights. notes: sentences for the report.
    requantized: weights that were rounded elsewhere, merged, by module; the others are rounded to nearest.
    Raises MismatchError when the plan was made for other inputs, PlanError when it isn't a merge, OutputError
    when `out` can't be written.
    """
    check_plan(plan, checkpoint, adapters, projections)
    check_output(out, force)
    work, untied = cut(plan, checkpoint, adapters, projections, requantized or {})
    config = merged_config(plan, checkpoint, untied)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for unit in work:
        layout |= unit.layout
    with staged_folder(out, force) as stage:
        layers = _write_tensors(stage, layout, work, max_shard_bytes, progress)
        report = _report(plan, checkpoint, adapters, projections, out, layers, notes, bool(requantized))
        _write_beside(stage, report, config, checkpoint, plan)
        size = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
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
    stage: Path, layout: Layout, work: Sequence[Unit], max_shard_bytes: int, progress: Progress
) -> tuple[LayerReport, ...]:
    writer, layers, done = ShardWriter(stage, layout, max_shard_bytes), [], 0
    free = shutil.disk_usage(stage).free
    if free < writer.total:
        raise OutputError(
            f"the merged model takes {writer.total:,} bytes and the disk of {stage.parent} has {free:,} "
            "left; free some or choose a smaller format with --to"
        )
    with writer:
        for unit in work:
            for result in unit.run():
                for name, tensor in result.tensors.items():
                    writer.write(name, tensor)
                    done += tensor.data.nbytes
                if result.layer is not None:
                    layers.append(result.layer)
                progress("merging", done, writer.total)
    return tuple(sorted(layers, key=lambda layer: layer.module))


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
