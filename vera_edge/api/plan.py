"""`vera_edge.plan`: formats chosen by measurement, as a file that merge and export take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.api.arguments import (
    Adapters,
    StrPath,
    Texts,
    loading,
    mixture,
    path_or_none,
    size_or_none,
    weighted,
)
from vera_edge.base.trained_as import TrainedAs
from vera_edge.precision import PlanRequest, parse_ratio
from vera_edge.precision.choice import ChosenPlan
from vera_edge.progress import Progress, silent
from vera_edge.requantize.devices import CPU
from vera_edge.storage.files import check_output, write_atomic
from vera_edge.storage.json_text import canonical_json

__all__ = ["ChosenPlan", "plan"]


def plan(
    base: StrPath,
    adapter: Adapters,
    *,
    out: StrPath,
    max_size: int | str | None = None,
    max_kl: float | None = None,
    max_latency: float | str | None = None,
    device_times: StrPath | None = None,
    mode: str = "merged",
    target: str = "onnx",
    formats: Sequence[str] = ("int4", "int8"),
    data: StrPath | None = None,
    tokens: int = PlanRequest.tokens,
    export: StrPath | None = None,
    method: str | None = None,
    effort: str | None = None,
    calibration: Texts = (),
    compute_device: str = CPU,
    weight: float = 1.0,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    max_memory: int | str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ChosenPlan:
    """Choose how each layer is stored: what loses least within a size or latency, or is smallest within a KL.

    Every unit is quantized alone and measured; the plan as a whole in torch, then exported and measured.

    Args:
        base: the base's folder.
        adapter: the PEFT folder; several that share their projections as {folder: weight} or a list.
        out: the plan to write, JSON.
        max_size: bytes of the whole export, or words like "90MB" or "90MiB". Give one limit of the three.
        max_kl: mean KL divergence in nats from the model as trained.
        max_latency: time of the layers' products over that of the quickest choice: 1.2 or "1.2x".
        device_times: the file that `vera-edge bench BUNDLE --products --json` wrote on the device whose
            times count; None: this machine's, where `max_latency` asks for any.
        mode: "merged": the adapter in the weights. "branch": beside them, and swapped at run time.
        target: what is exported to be measured: "onnx".
        formats: what layers may be stored as, of int4, int8, nf4, fp4, fp32; integers also with a block, like
            "int8:128".
        data: the UTF-8 text file to measure on, or "built-in"; None: what is calibrated on.
        tokens: about how many to measure each unit on; plans are measured on twice as many.
        export: also write the export that was measured, to this folder.
        method: how to round: rtn, search, hqq or gptq; None: gptq.
        effort: what search and gptq spend: quick, default or thorough; None: default.
        calibration: text to calibrate on: a UTF-8 file, several, or {file: share of the tokens};
            built-in text takes the rest.
        compute_device: what search and gptq compute on: cpu, cuda, mps, or auto, the first of the others.
        weight: scales the delta of an adapter that has no weight of its own.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        max_memory: bytes, or words like "6GB": a model that takes more than half of them in float32, or of
            what is free, is read layer by layer.
        force: replace `out`, and the folder `export`, where they exist.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        A Choice: the plan, what was measured of it (`trial`: bytes and KL in nats), the format of each unit
        (`picks`), bits per weight, and the front of what else could be had.

    Raises:
        PlanError: no limit is given or it can't be kept.
        AdapterError, CheckpointError, MismatchError, DataError, TargetError, OutputError: as `export`.

    Example:
        >>> found = vera_edge.plan("base", "adapter", out="plan.json", max_kl=1.0, tokens=256, method="rtn")
        >>> found.trial.kl <= 1.0, found.bits < 8
        (True, True)
    """
    pairs = weighted(adapter, weight)
    request = PlanRequest(
        max_size=size_or_none(max_size),
        max_kl=max_kl,
        max_latency=parse_ratio(max_latency) if isinstance(max_latency, str) else max_latency,
        device_times=None if device_times is None else str(device_times),
        mode=mode,
        formats=tuple(formats),
        target=target,
        method=method or PlanRequest.method,
        effort=effort or PlanRequest.effort,
        device=compute_device,
        calibration=mixture(calibration),
        data=None if data is None else str(data),
        tokens=tokens,
        max_memory=size_or_none(max_memory),
    )
    request.check()
    file, keep = Path(out), path_or_none(export)
    check_output(file, force)
    if keep is not None:
        check_output(keep, force, (Path(base), *(path for path, _ in pairs)))
    from vera_edge.precision.choose import choose  # imports torch

    facts = (Path(base), pairs, request, file, projection_rounding)
    found = choose(*facts, progress, keep, loading(trained_as))
    write_atomic(file, canonical_json(found.plan.to_dict()))
    return found
