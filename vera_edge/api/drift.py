"""`vera_edge.drift`, and `drift_each` of several: how far artefacts are from the model as trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vera_edge.api.arguments import BUILT_IN, Adapters, StrPath, loading, path_or_none, size_or_none, weighted
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError
from vera_edge.measuring import baseline as baselines
from vera_edge.measuring import limits as bounds
from vera_edge.measuring import outputs
from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.measuring.assess_each import assess_several
from vera_edge.measuring.comparison import Comparison, Interval
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport, raise_when_any_exceeded
from vera_edge.parallel import Engine
from vera_edge.progress import Progress, silent

__all__ = [
    "Comparison",
    "DriftReport",
    "EncoderReport",
    "Interval",
    "drift",
    "drift_each",
    "raise_when_exceeded",
]


def drift(
    reference: StrPath,
    artefact: StrPath,
    *,
    data: StrPath = BUILT_IN,
    base: StrPath | None = None,
    adapter: Adapters = (),
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    tokens: int = DriftRequest.tokens,
    window: int = DriftRequest.window,
    exact: bool = False,
    by_layer: bool = False,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_flips: float | None = None,
    min_retained: float | None = None,
    limits: StrPath | Mapping[str, float] | None = None,
    baseline: StrPath | None = None,
    report: StrPath | None = None,
    beside: Sequence[StrPath] = (),
    junit: StrPath | None = None,
    plots: StrPath | None = None,
    max_memory: int | str | None = None,
    progress: Progress = silent,
) -> DriftReport | EncoderReport:
    """Measure how far an artefact is from the model as trained.

    Fidelity is the KL divergence from the reference to the artefact, effect the one from the reference to the
    base without the adapter: an artefact whose fidelity isn't far below the effect has lost the adapter.

    Args:
        reference: the adapter's folder, a base's with `adapter`, or a branch export with exact weights.
        artefact: a merged or exported folder.
        data: the UTF-8 text file to measure on, or "built-in".
        base: the base's folder, where the reference is an adapter that doesn't find it.
        adapter: where the reference is a base: the adapter, or several as {folder: weight} or a list.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        tokenizer: a folder whose tokenizer reads the text for the reference.
        tokens: about how many to measure on.
        window: tokens a window.
        exact: run a bitsandbytes artefact on exact values, not in its kernels.
        by_layer: say which layer drifts, of artefacts with readable weights.
        max_kl, min_top1, max_flips, min_retained: limits: mean KL in nats, shares from 0 to 1.
        limits: more of them by name, or a TOML file with a [limits] table.
        baseline: an earlier report's JSON file, that this one must not fall behind.
        report: an HTML file to write.
        beside: other reports' JSON files, to plot beside.
        junit: a JUnit XML file to write, with a case for each limit.
        plots: a folder to write PNG plots to.
        max_memory: bytes, or words like "6GB": a model that takes more than half of them in float32, or of
            what is free, is run layer by layer; an ONNX export that would take more than half of them in ONNX
            Runtime, which is twice its size, is run in parts.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        A DriftReport, or for a model that gives embeddings or classes an EncoderReport. Both have a `verdict`
        and `passed`: whether every limit was kept. A DriftReport's `fidelity`, `effect` and `noise` hold
        estimates with 95 % intervals: KL in nats, agreement as shares; `retained` is 1 - fidelity / effect.

    Raises:
        MismatchError: the two don't belong together.
        DataError: the text can't be used.
        PlanError: a limit isn't known or can't be held.
        AdapterError, CheckpointError, BundleError: an input can't be read.
            A limit that is broken isn't an error: see `passed`.

    Example:
        >>> report = vera_edge.drift("adapter", "bundle", base="base", tokens=1024, window=64)
        >>> report.verdict.level, report.passed
        ('faithful', True)
    """
    named = {"max_kl": max_kl, "min_top1": min_top1, "max_flips": max_flips, "min_retained": min_retained}
    held = _held(limits, named)
    earlier = None if baseline is None else baselines.read(Path(baseline))
    others = [baselines.read(Path(path)) for path in beside]
    files = (path_or_none(report), path_or_none(junit), path_or_none(plots))
    outputs.check(*files)
    request = DriftRequest(
        Path(reference),
        Path(artefact),
        data=str(data),
        base=path_or_none(base),
        adapters=tuple(weighted(adapter)),
        projection_rounding=projection_rounding,
        tokenizer=path_or_none(tokenizer),
        tokens=tokens,
        window=window,
        exact=exact,
        samples=0 if report is None else outputs.SAMPLES,
        by_layer=by_layer,
        text_only=any(path is not None for path in (report, plots, baseline)),
        trained_as=loading(trained_as),
        limits=tuple(held),
        max_memory=size_or_none(max_memory),
    )
    found = bounds.hold(assess_any(request, progress), held)
    if isinstance(found, DriftReport) and earlier is not None:
        found = baselines.hold(found, earlier)
    outputs.write(found, *files, others)
    return found


def drift_each(
    reference: StrPath,
    artefacts: Sequence[StrPath],
    *,
    data: StrPath = BUILT_IN,
    base: StrPath | None = None,
    adapter: Adapters = (),
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    tokens: int = DriftRequest.tokens,
    window: int = DriftRequest.window,
    exact: bool = False,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_flips: float | None = None,
    min_retained: float | None = None,
    limits: StrPath | Mapping[str, float] | None = None,
    max_memory: int | str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress = silent,
) -> list[DriftReport | EncoderReport]:
    """Measure each of several artefacts (`vera-edge drift` with more than one); the reference is run once.

    Args:
        reference: as in `drift`.
        artefacts: merged or exported folders; all are open at once.
        data, base, ...: all as in `drift`, limits too: each artefact is held to them.
        engine: "local", or "ray" for a cluster that shares the disk, where each artefact is a task that runs
            the reference as well.
        ray_address: of the Ray cluster; None starts one on this machine.

    Returns:
        A report for each artefact, in their order, as `drift` gives it.

    Raises:
        PlanError: no artefact is given, or one twice. All else as `drift`.

    Example:
        >>> reports = vera_edge.drift_each("adapter", ["bundle"], base="base", tokens=1024, window=64)
        >>> [report.verdict.level for report in reports]
        ['faithful']
    """
    paths = [Path(artefact) for artefact in artefacts]
    if not paths:
        raise PlanError("there is no artefact to measure; give one folder or more")
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise PlanError(f"{twice} is given more than once; give each artefact once")
    named = {"max_kl": max_kl, "min_top1": min_top1, "max_flips": max_flips, "min_retained": min_retained}
    held = _held(limits, named)
    request = DriftRequest(
        Path(reference),
        paths[0],
        data=str(data),
        base=path_or_none(base),
        adapters=tuple(weighted(adapter)),
        projection_rounding=projection_rounding,
        tokenizer=path_or_none(tokenizer),
        tokens=tokens,
        window=window,
        exact=exact,
        trained_as=loading(trained_as),
        limits=tuple(held),
        max_memory=size_or_none(max_memory),
    )
    found = assess_several(request, paths, Engine(engine, address=ray_address), progress)
    return [bounds.hold(report, held) for report in found]


def raise_when_exceeded(reports: Sequence[DriftReport | EncoderReport]) -> None:
    """Raise DriftExceeded when any limit was broken or can't be decided; the sentence names all of them."""
    raise_when_any_exceeded({report.candidate.path: report.outcomes for report in reports})


def _held(
    limits: StrPath | Mapping[str, float] | None, named: Mapping[str, float | None]
) -> dict[str, float]:
    """All limits by name; `named` go over the others."""
    if isinstance(limits, Mapping):
        given = {name: bound for name, bound in named.items() if bound is not None}
        return bounds.gather(None, {**limits, **given})
    return bounds.gather(path_or_none(limits), named)
