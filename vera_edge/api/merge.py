"""`vera_edge.merge`, `merge_each`, and `plan_merge`, `plan_merge_each`, which say what would be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_edge import merging
from vera_edge.api.arguments import (
    Adapters,
    StrPath,
    Texts,
    folders,
    loading,
    mixture,
    path_or_none,
    plan_or_none,
    size_or_none,
    weighted,
)
from vera_edge.base.trained_as import TrainedAs
from vera_edge.cores import available_cores
from vera_edge.formats import block_option
from vera_edge.merging import LayerReport, MergeCost, MergeReport
from vera_edge.parallel import Engine
from vera_edge.plans.plan import SAME, Plan
from vera_edge.progress import Progress, silent
from vera_edge.requantize.devices import CPU
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folders

__all__ = [
    "LayerReport",
    "MergeCost",
    "MergeReport",
    "Plan",
    "PlannedMerge",
    "merge",
    "merge_each",
    "plan_merge",
    "plan_merge_each",
]


@dataclass(frozen=True, eq=False)
class PlannedMerge:
    """What a merge would do: the plan, layer by layer, and `notes`, sentences for a person to read."""

    plan: Plan
    notes: tuple[str, ...]
    _ready: merging.Prepared = field(repr=False)

    def estimate(self) -> MergeCost:
        """Bytes read and written, bytes of memory and seconds, of one worker; computes one layer to tell."""
        return merging.estimate(self._ready)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return self.plan.to_dict()


def merge(
    base: StrPath,
    adapter: Adapters,
    *,
    out: StrPath,
    to: str = SAME,
    block_size: int | None = None,
    double_quant: bool = False,
    plan: StrPath | Plan | None = None,
    method: str | None = None,
    effort: str | None = None,
    calibration: Texts = (),
    compute_device: str = CPU,
    weight: float = 1.0,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    workers: int | None = None,
    max_memory: int | str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Merge an adapter, or several, into their base, and write the model as a Hugging Face folder.

    The weights become `dequantize(W) + sum_i weight_i * delta_i`, computed in float32 and stored in the
    format asked for. The output loads with transformers as any model does.

    Args:
        base: the base's folder.
        adapter: the PEFT folder; several that share their projections as {folder: weight} or a list.
        out: the folder to write, whole or not at all.
        to: how the linear layers are stored: same, fp32, bf16, fp16, nf4, fp4, int8, gptq, gptq8, awq, w4a16,
            w8a16, w8a8, fp8, fp8-dynamic.
        block_size: weights to one scale: of nf4 and fp4 (64 unless given), of gptq, awq and w4a16 (128).
        double_quant: quantize the scales of nf4 and fp4 too.
        plan: a plan's file, or a Plan, that decides to, block_size and double_quant layer by layer.
        method: how to round: rtn, search, hqq or gptq; None: gptq for 4 bits, else rtn.
        effort: what search and gptq spend: quick, default or thorough; None: a plan's own, else default.
        calibration: text to calibrate on: a UTF-8 file, several, or {file: share of the tokens};
            built-in text takes the rest.
        compute_device: what search and gptq compute on: cpu, cuda, mps, or auto, the first of the others.
        weight: scales the delta of an adapter that has no weight of its own.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        tokenizer: a folder to take tokenizer and chat template from, not from the adapter's or the base's.
        workers: layers at once, each in a thread; None: as many as there are cores.
        max_memory: bytes that the merge may take, or words like "2GB"; None for no limit.
        engine: "local", or "ray" for a cluster that shares the disk, at ray_address.
        ray_address: of the Ray cluster; None starts one on this machine.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much (bytes).

    Returns:
        A MergeReport: the folder, its size in bytes, and what rounding has left of the adapter: `survival`
        (shares of the delta) in all, `layers` one by one, and `warning`, a sentence when it is drowned.

    Raises:
        AdapterError, CheckpointError: an input can't be read.
        MismatchError: adapter and base don't belong together.
        PlanError: the request makes no sense.
        OutputError: `out` exists or can't be written.

    Example:
        >>> report = vera_edge.merge("base", "adapter", out="merged", to="bf16")
        >>> report.folder.name, report.survival.retained > 0.9
        ('merged', True)
    """
    resources = _resources(engine, workers, ray_address, max_memory)
    planned = plan_merge(
        base,
        adapter,
        to=to,
        block_size=block_size,
        double_quant=double_quant,
        plan=plan,
        weight=weight,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        tokenizer=tokenizer,
    )
    rounding = Rounding(
        method, mixture(calibration), effort=effort, max_memory=resources.max_memory, device=compute_device
    )
    return merge_to_folders({Path(out): planned._ready}, rounding, progress, force, resources)[0]


def merge_each(
    base: StrPath,
    adapters: Sequence[StrPath],
    *,
    out: StrPath,
    to: str = SAME,
    block_size: int | None = None,
    double_quant: bool = False,
    method: str | None = None,
    effort: str | None = None,
    calibration: Texts = (),
    compute_device: str = CPU,
    weight: float = 1.0,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    workers: int | None = None,
    max_memory: int | str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[MergeReport]:
    """Merge each of many adapters into the base by itself (`vera-edge merge --each`); the base is read once.

    Args:
        base: the base's folder.
        adapters: PEFT folders, which needn't have anything in common but the base.
        out: the folder to write into; each model's is called as its adapter's folder.
        to, block_size, ...: all as in `merge`.

    Returns:
        A MergeReport for each adapter, in their order.

    Raises:
        PlanError: two adapters' folders have one name. All else as `merge`.

    Example:
        >>> reports = vera_edge.merge_each("base", ["adapter"], out="models", to="fp16")
        >>> [report.folder.name for report in reports]
        ['adapter']
    """
    resources = _resources(engine, workers, ray_address, max_memory)
    planned = plan_merge_each(
        base,
        adapters,
        to=to,
        block_size=block_size,
        double_quant=double_quant,
        weight=weight,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        tokenizer=tokenizer,
    )
    ready = {Path(out) / name: one._ready for name, one in planned.items()}
    return merge_to_folders(
        ready,
        Rounding(
            method,
            mixture(calibration),
            effort=effort,
            max_memory=resources.max_memory,
            device=compute_device,
        ),
        progress,
        force,
        resources,
    )


def plan_merge(
    base: StrPath,
    adapter: Adapters,
    *,
    to: str = SAME,
    block_size: int | None = None,
    double_quant: bool = False,
    plan: StrPath | Plan | None = None,
    weight: float = 1.0,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
) -> PlannedMerge:
    """Say what `merge` would do, and write nothing (`vera-edge merge --dry-run`). Reads no weight.

    Args:
        base, adapter, to, ...: all as in `merge`.

    Returns:
        A PlannedMerge: `plan.steps` has a step for each linear layer, `estimate()` bytes and seconds.

    Raises:
        A VeraEdgeError as `merge` does.

    Example:
        >>> planned = vera_edge.plan_merge("base", "adapter", to="fp16")
        >>> planned.plan.steps[0].action, planned.plan.steps[0].result
        ('merge', 'fp16')
    """
    made = plan_or_none(
        plan, to=(to, SAME), block_size=(block_size, None), double_quant=(double_quant, False)
    )
    asked = _options(to, block_size, double_quant)
    pairs = weighted(adapter, weight)
    ready = merging.prepare(
        Path(base), pairs, to, asked, projection_rounding, made, loading(trained_as), path_or_none(tokenizer)
    )
    return PlannedMerge(ready.plan, ready.model.notes, ready)


def plan_merge_each(
    base: StrPath,
    adapters: Sequence[StrPath],
    *,
    to: str = SAME,
    block_size: int | None = None,
    double_quant: bool = False,
    weight: float = 1.0,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
) -> Mapping[str, PlannedMerge]:
    """Say what `merge_each` would do, and write nothing.

    Args:
        base, adapters, to, ...: all as in `merge_each`.

    Returns:
        A PlannedMerge for each adapter, by the name of the folder that would be written.

    Raises:
        A VeraEdgeError as `merge_each` does.

    Example:
        >>> planned = vera_edge.plan_merge_each("base", ["adapter"])
        >>> list(planned)
        ['adapter']
    """
    asked = _options(to, block_size, double_quant)
    given = (Path(base), folders(adapters), weight, to, asked)
    found = merging.prepare_each(*given, projection_rounding, loading(trained_as), path_or_none(tokenizer))
    return {name: PlannedMerge(one.plan, one.model.notes, one) for name, one in found.items()}


def _options(to: str, block_size: int | None, double_quant: bool) -> dict[str, Any]:
    """Of the format `to`."""
    options: dict[str, Any] = {} if block_size is None else {block_option(to): block_size}
    return options | ({"double_quant": True} if double_quant else {})


def _resources(
    engine: str, workers: int | None, ray_address: str | None, max_memory: int | str | None
) -> merging.Resources:
    where = Engine(engine, available_cores() if workers is None else workers, ray_address)
    return merging.Resources(where, size_or_none(max_memory))
