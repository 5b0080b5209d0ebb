"""`vera-edge export`: base and adapter as a folder that a runtime opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    calibration_option,
    compute_device_option,
    effort_option,
    force_option,
    json_option,
    method_option,
    more_adapters_option,
    out,
    plan_option,
    print_json,
    progress_bar,
    projection_rounding_option,
    quiet_option,
    recover_option,
    refuse_beside_plan,
    tokenizer_option,
    trained_as_option,
    weight_option,
)

STORED = ("fp32", "fp16", "int8", "int4")
ONNX_WEIGHTS = "same, fp32, fp16, int8, int4, int2, nf4, fp4"
GGUF_WEIGHTS = "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k, q5_1, q5_0, q4_k_m, q4_k, q4_1, q4_0, iq4_nl"


@click.command()
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.option("-o", "--out", "folder", type=FOLDER, required=True, help="The folder to write.")
@click.option("--onnx", is_flag=True, expose_value=False, help="Export to ONNX, which is the default.")
@click.option("--target", default="onnx", show_default=True, help="onnx, gguf, or one that is installed.")
@click.option(
    "--mode",
    type=click.Choice(["merged", "branch"]),
    help="merged: the adapter in the weights. branch: beside them, and swapped at run time.  "
    "[default: merged, or what --for picks]",
)
@click.option(
    "--for",
    "device",
    metavar="DEVICE",
    help="Choose weights, head and mode for a device: pi5-4gb, pi5-8gb, phone-6gb, phone-12gb, laptop-8gb, "
    "laptop-16gb, or the file that `vera-edge bench BUNDLE --json` wrote on it.",
)
@click.option(
    "--weights",
    "--ship",
    help=f"How the linear layers are stored. onnx: {ONNX_WEIGHTS} (same: as the base stores them). "
    f"gguf: {GGUF_WEIGHTS}.  [default: int8, for gguf q8_0; in a branch what a quantized base has]",
)
@click.option(
    "--run",
    type=click.Choice(["int8"]),
    help="What `vera-edge install` expands the weights to on the device: --ship nf4 --run int8.",
)
@more_adapters_option
@weight_option
@click.option("--block", type=int, help="Inputs that share a scale: 16, 32, 64, 128 or 256.  [default: 32]")
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Integers without zero points, or with.  [default: int8 without, int4 and int2 with]",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    help="What activations are rounded to beside integer weights: 4: int8, the default; 0: nothing, slow.",
)
@click.option(
    "--activations",
    type=click.Choice(["float", "dynamic", "static"]),
    help="Encoders: what int8 linears read: float32, the default, or uint8 in ONNX's own operators, its "
    "range found at each run (dynamic) or on the calibration text (static).",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float", "int8"]),
    help="onnx, decoders: what keys and values are kept as while it runs: float32, the default, or int8, in "
    "a quarter of the memory.",
)
@click.option(
    "--head",
    help=f"How embeddings and output head are stored: {', '.join(STORED)}; for gguf any of its weights.",
)
@click.option(
    "--head-activations",
    type=click.Choice(["int8", "int16"]),
    help="Decoders: what an integer head reads is rounded to. int16 keeps a third of what int8 loses in the "
    "whole graph, for a slower head.  [default: int8]",
)
@click.option("--store-projections", type=click.Choice(STORED), help="How a branch stores A and B.")
@click.option(
    "--projections-from",
    type=click.Choice(["baked", "seed"]),
    help="Branch: A and B in the files (baked, the default), or drawn from the seed on the device.",
)
@click.option(
    "--vectors",
    type=click.Choice(["fp32", "fp16"]),
    help="Branch: the dtype of the graph's vectors and of every .onnx_adapter for it.  [default: fp32]",
)
@click.option(
    "--imatrix",
    type=click.Choice(["gguf", "dat"]),
    help="gguf: also write the importance matrix that `llama-quantize --imatrix` reads, of --calibration.",
)
@projection_rounding_option
@trained_as_option
@tokenizer_option
@plan_option
@method_option
@effort_option
@calibration_option
@compute_device_option
@recover_option
@click.option("--max-memory", metavar="SIZE", help="Calibrate within it, like 6GB; see the docs.")
@click.option("--dry-run", is_flag=True, help="Say what it would write and take, and write nothing.")
@force_option
@quiet_option
@json_option
def export(
    base: Path,
    adapter: Path,
    folder: Path,
    target: str,
    mode: str | None,
    device: str | None,
    weights: str | None,
    more: list[tuple[Path, float]],
    weight: float,
    run: str | None,
    block: int | None,
    symmetric: bool | None,
    accuracy_level: str | None,
    activations: str | None,
    kv_cache: str | None,
    head: str | None,
    head_activations: str | None,
    store_projections: str | None,
    projections_from: str | None,
    vectors: str | None,
    imatrix: str | None,
    projection_rounding: str | None,
    trained_as: str | None,
    tokenizer: Path | None,
    plan_file: Path | None,
    method: str | None,
    effort: str | None,
    calibration: tuple[str, ...],
    compute_device: str,
    recover: tuple[str, ...],
    max_memory: str | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export BASE with ADAPTER to a folder that ONNX Runtime, GenAI, or llama.cpp (--target gguf) opens."""
    refuse_beside_plan("mode", "weights", "block", "symmetric", "activations")
    pairs = [(adapter, weight), *more]
    asked: dict[str, Any] = {
        "target": target,
        "mode": mode,
        "weights": weights,
        "run": run,
        "block": block,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "activations": activations,
        "kv_cache": kv_cache,
        "head": head,
        "head_activations": head_activations,
        "store_projections": store_projections,
        "projections_from": projections_from,
        "vectors": vectors,
        "imatrix": imatrix,
        "projection_rounding": projection_rounding,
        "trained_as": trained_as,
        "tokenizer": tokenizer,
        "plan": plan_file,
        "device": device,
    }
    if dry_run:
        _show_planned(vera_edge.plan_export(base, pairs, **asked), as_json)
        return
    asked |= {"method": method, "effort": effort, "calibration": calibration, "recover": recover}
    asked |= {"compute_device": compute_device}
    asked |= {"max_memory": max_memory, "force": force}
    with progress_bar(quiet or as_json) as progress:
        result = vera_edge.export(base, pairs, out=folder, progress=progress, **asked)
    if as_json:
        print_json(result.to_dict())
        return
    console = out()
    kind = result.plan.weights if plan_file is None else "planned"
    console.print(f"{result.folder}: {result.plan.mode}, {kind} weights, {result.size / 1e6:,.1f} MB")
    for name, path in result.adapters.items():
        console.print(f"adapter {name}: {path}")
    for note in result.notes:
        console.print(note)


def _show_planned(planned: vera_edge.PlannedExport, as_json: bool) -> None:
    if as_json:
        print_json(planned.to_dict())
        return
    cost, table = planned.cost, Table("export", "", box=SIMPLE_HEAD)
    table.add_row("writes", f"about {cost.size / 1e6:,.1f} MB")
    table.add_row("disk", f"about {cost.disk / 1e6:,.1f} MB at most")
    table.add_row("memory", f"about {cost.memory / 1e6:,.0f} MB at most")
    table.add_row("time", f"about {cost.seconds:,.0f} s, and calibration where the method needs it")
    out().print(table)
    for note in planned.notes:
        out().print(note)
