"""`vera_edge.export`: base and adapter as a folder that ONNX Runtime opens; `plan_export`: what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vera_edge.api.arguments import (
    Adapters,
    StrPath,
    Texts,
    loading,
    mixture,
    path_or_none,
    plan_or_none,
    size_or_none,
    weighted,
)
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError
from vera_edge.exporting import target as targets
from vera_edge.exporting.exporter import Export
from vera_edge.exporting.target import ExportArguments, PlannedExport
from vera_edge.plans.plan import Plan
from vera_edge.progress import Progress, silent
from vera_edge.requantize.devices import CPU
from vera_edge.rounding.weight_rounding import Rounding

__all__ = ["Export", "PlannedExport", "export", "plan_export"]


def export(
    base: StrPath,
    adapter: Adapters,
    *,
    out: StrPath,
    target: str = "onnx",
    mode: str | None = None,
    weights: str | None = None,
    run: str | None = None,
    weight: float = 1.0,
    block: int | None = None,
    symmetric: bool | None = None,
    accuracy_level: str | int | None = None,
    activations: str | None = None,
    kv_cache: str | None = None,
    head: str | None = None,
    head_activations: str | None = None,
    store_projections: str | None = None,
    projections_from: str | None = None,
    vectors: str | None = None,
    imatrix: str | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    plan: StrPath | Plan | None = None,
    device: StrPath | None = None,
    method: str | None = None,
    effort: str | None = None,
    calibration: Texts = (),
    compute_device: str = CPU,
    recover: Sequence[str] = (),
    max_memory: int | str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Export:
    """Export base and adapter to a folder that ONNX Runtime and ONNX Runtime GenAI open as it is.

    Args:
        base: the base's folder.
        adapter: the PEFT folder; several that share their projections as {folder: weight} or a list.
        out: the folder to write, whole or not at all.
        target: "onnx", "gguf" (llama.cpp), or the name of an exporter that is installed.
        mode: "merged", unless given: the adapter in the weights. "branch": beside them, and swapped at run
            time.
        weights: how the linear layers are stored: same (as the base stores them), fp32, fp16, int8, int4,
            int2, nf4, fp4; for gguf f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k, q5_1, q5_0, q4_k_m, q4_k, q4_1,
            q4_0, iq4_nl. None: int8 (gguf: q8_0), but in a branch the integers of a base that is quantized;
            a note says so, and what other choices would take.
        run: "int8": what `install` expands 4-bit weights to on the device.
        weight: scales the delta of an adapter that has no weight of its own.
        block: inputs that share a scale: 16, 32 (unless given), 64, 128 or 256.
        symmetric: integers without zero points; None: int8 without, int4 and int2 with.
        accuracy_level: what activations are rounded to beside integer weights: 4: int8, 0: nothing.
        activations: encoders: what int8 linears read: float, dynamic or static (uint8).
        kv_cache: decoders: what keys and values are kept as while it runs: float (float32), or int8, by
            scales of the calibration text.
        head: how embeddings and output head are stored: fp32, fp16, int8, int4; for gguf any of its weights.
        head_activations: decoders: what an integer head reads is rounded to int8, or to int16.
        store_projections: how a branch stores A and B: fp32, fp16, int8, int4.
        projections_from: a branch's A and B "baked" into the files, or drawn from the "seed" on the device.
        vectors: the dtype of a branch's vectors and of every .onnx_adapter for it: fp32 or fp16.
        imatrix: for gguf: "gguf" or "dat" also writes the importance matrix that `llama-quantize` reads, of
            the calibration text.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        tokenizer: a folder to take tokenizer and chat template from, not from the adapter's or the base's.
        plan: a plan's file, or a Plan, that decides mode, weights, block, symmetric and activations.
        device: what the export is for: "pi5-4gb", "pi5-8gb", "phone-6gb", "phone-12gb", "laptop-8gb",
            "laptop-16gb", or the file of `vera-edge bench --json`; it decides weights, head, and a mode that
            isn't given: the form that loses least among those that fit there and are quick enough.
        method: how to round: rtn, search, hqq or gptq; None: gptq for 4 bits, else rtn.
        effort: what search and gptq spend: quick, default or thorough; None: a plan's own, else default.
        calibration: text to calibrate on: a UTF-8 file, several, or {file: share of the tokens};
            built-in text takes the rest.
        compute_device: what search and gptq compute on: cpu, cuda, mps, or auto, the first of the others.
        recover: what to fit to the rounded base: lambda_b, lambda_d (a branch's), low-rank=RANK, bias.
        max_memory: bytes, or words like "6GB": of what calibration text leaves between layers, an eighth of
            them stays in memory, 512 MiB at most; the rest goes to the disk.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        An Export: the folder, the graph's file `model`, the size in bytes of all files, the plan, and
        `adapters`, the .onnx_adapter files by name.

    Raises:
        AdapterError, CheckpointError: an input can't be read.
        MismatchError: adapter and base don't belong together.
        PlanError: the request makes no sense.
        TargetError: the target isn't installed, or refuses the model.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.export("base", "adapter", out="exported", mode="branch", weights="fp32")
        >>> made.plan.mode, made.model.name
        ('branch', 'model.onnx')
    """
    asked = _asked(
        plan,
        target=target,
        mode=mode,
        weights=weights,
        run=run,
        block=block,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        activations=activations,
        kv_cache=kv_cache,
        head=head,
        head_activations=head_activations,
        projections=store_projections,
        origin=projections_from,
        vectors=vectors,
        imatrix=imatrix,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        tokenizer=tokenizer,
        device=device,
    )
    return targets.export(
        Path(base),
        weighted(adapter, weight),
        Path(out),
        **vars(asked),
        force=force,
        progress=progress,
        rounding=Rounding(
            method,
            mixture(calibration),
            recover=tuple(recover),
            effort=effort,
            device=compute_device,
            max_memory=size_or_none(max_memory),
        ),
    )


def plan_export(
    base: StrPath,
    adapter: Adapters,
    *,
    target: str = "onnx",
    mode: str | None = None,
    weights: str | None = None,
    run: str | None = None,
    weight: float = 1.0,
    block: int | None = None,
    symmetric: bool | None = None,
    accuracy_level: str | int | None = None,
    activations: str | None = None,
    kv_cache: str | None = None,
    head: str | None = None,
    head_activations: str | None = None,
    store_projections: str | None = None,
    projections_from: str | None = None,
    vectors: str | None = None,
    imatrix: str | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    plan: StrPath | Plan | None = None,
    device: StrPath | None = None,
) -> PlannedExport:
    """Say what `export` would write and take, and write nothing (`vera-edge export --dry-run`).

    Args:
        base, adapter, target, ...: all as in `export`.

    Returns:
        A PlannedExport: the plan, and `cost`: bytes of the folder, of memory and of the disk, and seconds,
        estimated by trying one layer; calibration comes on top.

    Raises:
        A VeraEdgeError as `export` does.

    Example:
        >>> planned = vera_edge.plan_export("base", "adapter", weights="int8")
        >>> planned.plan.weights, planned.cost.size > 0
        ('int8', True)
    """
    asked = _asked(
        plan,
        target=target,
        mode=mode,
        weights=weights,
        run=run,
        block=block,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        activations=activations,
        kv_cache=kv_cache,
        head=head,
        head_activations=head_activations,
        projections=store_projections,
        origin=projections_from,
        vectors=vectors,
        imatrix=imatrix,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        tokenizer=tokenizer,
        device=device,
    )
    return targets.plan_export(Path(base), weighted(adapter, weight), Path("export"), asked)


def _asked(
    plan: StrPath | Plan | None,
    *,
    target: str,
    mode: str | None,
    weights: str | None,
    projection_rounding: str | None,
    trained_as: str | TrainedAs | None,
    tokenizer: StrPath | None,
    device: StrPath | None,
    **options: Any,
) -> ExportArguments:
    """What is asked of an export; options: the target's own, by its names, None where one isn't given."""
    decided = {name: options[name] for name in ("block", "symmetric", "activations")}
    made = plan_or_none(
        plan,
        mode=(mode, None),
        weights=(weights, None),
        **{name: (value, None) for name, value in decided.items()},
    )
    if device is not None:
        _check_left_to_device(plan=plan, weights=weights, run=options["run"], head=options["head"], **decided)
    given = {name: _written(value) for name, value in options.items() if value is not None}
    return ExportArguments(
        target,
        mode,
        weights,
        given,
        projection_rounding,
        made,
        loading(trained_as),
        path_or_none(tokenizer),
        None if device is None else str(device),
    )


def _check_left_to_device(**decided: object) -> None:
    """Raise PlanError when something that a device's profile decides is given beside it."""
    for name, given in decided.items():
        if given is not None:
            raise PlanError(f"the device decides how weights are stored, and {name} is given; leave one out")


def _written(value: object) -> str:
    """An option as a target reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
