"""Performs a merge plan: reads the base piece by piece and writes an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from vera_edge.adapters.adapter import VERA
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import MERGE_RECORD, Checkpoint
from vera_edge.errors import OutputError, PlanError
from vera_edge.merging import advice, card
from vera_edge.merging.config import merged_config
from vera_edge.merging.delta import Delta, merge_rows
from vera_edge.merging.journal import Done
from vera_edge.merging.memory import ONE_PROCESS, Resources, allowed_workers, may_compile
from vera_edge.merging.report import MergeReport
from vera_edge.merging.stage import Stage, files_of, opened, tidy
from vera_edge.merging.work import MergeJob, do_unit, is_there, key_of
from vera_edge.parallel import Engine
from vera_edge.plans import step_options
from vera_edge.plans.plan import Plan, check_made_for
from vera_edge.progress import Progress, silent
from vera_edge.requantize import Codes
from vera_edge.storage import side_files
from vera_edge.storage.files import check_output, write_atomic
from vera_edge.storage.json_text import canonical_json, settings_json
from vera_edge.storage.shards import MAX_SHARD_BYTES, ShardWriter
from vera_edge.trained.trained_model import TrainedModel

WHAT, ALONE = "merging", "quantizing"  # in progress, whose unit is a byte; ALONE: of bases without adapters


def merged_weight(model: TrainedModel, module: str) -> Float32:
    """One linear's weight with the adapters' deltas added, exact base values, float32 (out, in)."""
    base = model.checkpoint.load(module)
    delta = Delta(module, base.shape[1], model.adapters, model.projections)
    return merge_rows(module, base, None if delta.is_zero else delta)


@dataclass(frozen=True, eq=False)
class Merge:
    """One merge to perform. plan: made for `model`.

    notes: sentences for the report. requantized: weights that were rounded elsewhere, merged, by module; the
    others are rounded to nearest.
    """

    plan: Plan
    model: TrainedModel
    out: Path
    notes: Sequence[str] = ()
    requantized: Mapping[str, Codes] = field(default_factory=dict)


def write(
    plan: Plan,
    model: TrainedModel,
    out: Path,
    progress: Progress = silent,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resources: Resources = ONE_PROCESS,
) -> MergeReport:
    """`write_each` of one merge."""
    return write_each([Merge(plan, model, out)], progress, force, max_shard_bytes, resources)[0]


def write_each(
    merges: Sequence[Merge],
    progress: Progress = silent,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resources: Resources = ONE_PROCESS,
) -> list[MergeReport]:
    """Perform merges of one base and write each model to its folder, whole or not at all.

    A layer is merged for all of them before the next one. resources: where it runs; the bytes don't depend
    on it, nor on what else is merged beside. What a run that was killed has finished isn't done again, if
    it's the same merge (`work.key_of`), the files still hold it and the base still holds what it read.
    Raises MismatchError when a plan was made for other inputs, PlanError when it isn't a merge or can't fit
    in memory, OutputError when a folder can't be written, VeraEdgeError when workers keep dying.
    """
    jobs = [_job(merge, force, max_shard_bytes, resources) for merge in merges]
    workers = allowed_workers(jobs, resources)
    configs = [merged_config(job.plan, job.model.checkpoint, job.untied) for job in jobs]
    with ExitStack() as held:
        stages = [
            held.enter_context(opened(merge.out, job.key)) for merge, job in zip(merges, jobs, strict=True)
        ]
        found = _write_tensors(jobs, stages, resources.engine, workers, progress)
        reports = []
        for merge, stage, done, config in zip(merges, stages, found, configs, strict=True):
            report = _report(merge, done)
            _write_beside(stage.files, report, config, merge)
            size = sum(path.stat().st_size for path in stage.files.rglob("*") if path.is_file())
            reports.append(replace(report, size=size))
        for stage in stages:
            stage.commit()
    return reports


def _job(merge: Merge, force: bool, max_shard_bytes: int, resources: Resources) -> MergeJob:
    check_plan(merge.plan, merge.model)
    tidy(merge.out)
    check_output(merge.out, force, merge.model.folders)
    key = key_of(merge.plan, merge.requantized, max_shard_bytes)
    folder = files_of(merge.out.absolute(), key)  # a worker may stand elsewhere
    where = (folder, max_shard_bytes, resources.in_flight or 1, may_compile(resources))
    return MergeJob(key, merge.plan, merge.model, merge.requantized, *where)


def check_plan(plan: Plan, model: TrainedModel) -> None:
    """Raise unless `plan` is a merge of exactly these inputs into formats that can be written."""
    if plan.mode != "merged":
        raise PlanError(
            "this plan keeps the adapter as a side-branch, which a checkpoint can't hold; export it"
        )
    check_made_for(plan, model)
    for step in plan.steps:
        # Where a plan also decides on the head, it's one of a graph, whose integers are blocks.
        if step.result in ("int4", "int8") and "head" in plan.options:
            raise PlanError(
                f"this plan stores {step.module} as {step.result} blocks, which only a graph holds; export it"
            )
    step_options.check(plan, model.checkpoint, graph=False)


def _write_tensors(
    jobs: list[MergeJob], stages: list[Stage], engine: Engine, workers: int | None, progress: Progress
) -> list[dict[int, Done]]:
    """Do the units that aren't done yet; all of them, by job."""
    for job, stage in zip(jobs, stages, strict=True):
        _keep_only_shards(job, stage)
    _check_space(jobs, stages)
    with ExitStack() as held:
        writers = [held.enter_context(ShardWriter(job.shards)) for job in jobs]
        found = [_take_up(job, stage, progress) for job, stage in zip(jobs, stages, strict=True)]
        total = sum(job.shards.total for job in jobs)
        written = sum(job.sizes[number] for job, done in zip(jobs, found, strict=True) for number in done)
        left = [(which, number) for which, job in enumerate(jobs) for number in range(len(job.units))]
        left = [(which, number) for which, number in left if number not in found[which]]
        left.sort(key=lambda item: item[::-1])  # one layer of the base for all jobs, then the next
        what = WHAT if any(job.model.adapters for job in jobs) else ALONE
        progress(what, written, total)
        with closing(engine.map_with(_do, jobs, left, workers, threads=True)) as results:
            for index, done in results:
                which = left[index][0]
                stages[which].journal.add(done)
                found[which][done.unit] = done
                written += jobs[which].sizes[done.unit]
                progress(what, written, total)
        for job, writer in zip(jobs, writers, strict=True):
            for name in job.shards.layout:
                writer.claim(name)
    return found


def _do(jobs: list[MergeJob], item: tuple[int, int]) -> Done:
    return do_unit(jobs[item[0]], item[1])


def _keep_only_shards(job: MergeJob, stage: Stage) -> None:
    """Remove what a run that was killed near its end left beside the shards, half-written files among it."""
    shards = set(job.shards.files.values())
    for path in stage.files.iterdir():
        if path.name not in shards:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(jobs: list[MergeJob], stages: list[Stage]) -> None:
    free = shutil.disk_usage(stages[0].files).free
    held = sum(_allocated(path) for stage in stages for path in stage.files.iterdir())
    total = sum(job.shards.total for job in jobs)
    if free + held < total:  # what an earlier run wrote is held already
        raise OutputError(
            f"{'the merged model takes' if len(jobs) == 1 else 'the merged models take'} {total:,} bytes and "
            f"the disk of {stages[0].target.parent} has {free:,} left; free some, or merge into a smaller "
            "format"
        )


def _allocated(path: Path) -> int:
    """Bytes of the disk that a file takes: less than its size where a shard has holes yet."""
    facts = path.stat()
    return facts.st_blocks * 512 if hasattr(facts, "st_blocks") else facts.st_size  # Windows has none


def _take_up(job: MergeJob, stage: Stage, progress: Progress) -> dict[int, Done]:
    """What earlier runs finished, as far as the files hold it."""
    said, found = sorted(stage.journal.done.items()), {}
    for number, (unit, done) in enumerate(said, 1):
        if is_there(job, done):
            found[unit] = done
        progress("verifying what was merged before", number, len(said))
    return found


def _report(merge: Merge, done: Mapping[int, Done]) -> MergeReport:
    plan, model = merge.plan, merge.model
    layers = sorted((one.layer for one in done.values() if one.layer), key=lambda layer: layer.module)
    changed = {layer.module for layer in layers}
    report = MergeReport(
        folder=merge.out,
        weights=plan.weights,
        layers=tuple(layers),
        results=dict(sorted(Counter(step.result for step in plan.steps).items())),
        size=0,
        base_digest=_base_digest(model.checkpoint, done),
        adapters=tuple((adapter.name, adapter.digest, float(weight)) for adapter, weight in model.adapters),
        projection=model.projection_record,
        notes=tuple(merge.notes),
        method=next((adapter.method for adapter, _ in model.adapters), VERA),
        unchanged=tuple(
            step.module for step in plan.steps if step.action == "merge" and step.module not in changed
        ),
    )
    if merge.requantized:
        # Compensated rounding spends weight-space error to save output error: shares of the delta say little.
        return report
    return replace(report, warning=advice.warning(report, model))


def _base_digest(checkpoint: Checkpoint, done: Mapping[int, Done]) -> str:
    """The base's digest, of the bytes that the units read."""
    read = {name: digest for one in done.values() for name, digest in one.read.items()}
    read = {name: digest for name, digest in read.items() if name not in checkpoint.placed}
    unread = checkpoint.stored.keys() - read.keys()  # those that adapters replace, or that have no place
    return checkpoint.digest_of(read | checkpoint.tensor_digests(unread, stored=True))


def _write_beside(stage: Path, report: MergeReport, config: dict[str, object], merge: Merge) -> None:
    """Everything but the weights."""
    checkpoint = merge.model.checkpoint
    write_atomic(stage / "config.json", settings_json(config))
    checkpoint.files.copy(stage)
    base_name = str(checkpoint.config.get("_name_or_path") or checkpoint.path.resolve().name)
    write_atomic(stage / "README.md", card.text(report, base_name, config).encode())
    if not report.adapters:
        if (checkpoint.path / MERGE_RECORD).is_file():  # which adapters are in it already
            side_files.copy(checkpoint.path, stage, [MERGE_RECORD])
        return
    record = {"plan": merge.plan.to_dict(), "report": report.facts()}
    write_atomic(stage / MERGE_RECORD, canonical_json(record))
