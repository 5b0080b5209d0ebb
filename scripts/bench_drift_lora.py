"""The LoRA section of docs/drift-table.md: the QLoRA adapter of examples/lora, by us and by others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from scripts import bench_drift_table as tables
from scripts.bench_drift_genai import GENAI, built, made
from scripts.bench_drift_peers import builders
from scripts.bench_drift_rows import Made, Row, Way
from scripts.bench_drift_ways import short
from scripts.lora_training import FOLDER, RECIPES
from scripts.prepare_demo import Demo
from vera_edge import merging as merge

NAME = "qlora-nf4"
_LEFT_OUT = (
    "fp32 merged",
    "int4 branch",
)  # the one tells nothing new, the other is int4 merged but for pairs
_INTRO = """
The same base with a LoRA adapter: QLoRA of rank {rank} on {targets}, {steps} steps (examples/lora/{name});
{measured} tokens of the Python reference that it wasn't trained on, and {other} of Python code. Rows are
measured as those above. A LoRA beside the base is counted in *on disk*, not in *bits a weight*. The builder
reads no NF4: it was given a float32 folder of its exact values, so what it loses is its own rounding. With
`adapter_path` it rounds the LoRA's own matrices to int4 as it does every product, and they are counted so.
{packages}.
"""
_OLIVE = """
Olive has no row: olive-ai 0.13.0 makes no graph that runs beside these packages. Its `capture-onnx-graph
--use_model_builder` imports `onnxruntime_genai.models.quantized_model`, which onnxruntime-genai 0.18.0
doesn't have. Of the builder's own float32 graph with `adapter_path`, its `generate-adapter` writes one that
has every LoRA input twice, `quantize --algorithm rtn` makes `MatMulNBits` of width 0 of their empty defaults,
and ONNX Runtime refuses what comes of it ("Duplicate definition-site").
"""


@dataclass(frozen=True)
class LoraDemo(Demo):
    """The demo with a LoRA in the place of its adapter."""

    @property
    def adapter(self) -> Path:
        return FOLDER / NAME


def ways(demo: Demo, out: Path) -> Iterator[Way]:
    """Ours, PEFT's, GenAI's builder's and Olive's ways to ship the adapter of a LoraDemo."""
    yield from (way for way in short(demo, out) if way.name not in _LEFT_OUT)
    yield from builders(demo, out, ("rtn", "k_quant"))
    beside = partial(_builder_beside, demo, out)
    yield Way("ONNX Runtime GenAI builder, int4 rtn, `adapter_path`", beside, GENAI)


def _float_base(demo: Demo, out: Path) -> Path:
    """The NF4 base's exact values as a float32 folder."""
    folder = out / "base-fp32"
    if not folder.is_dir():
        merge.perform(merge.prepare_base(demo.base, "fp32"), folder)
    return folder


def _builder_beside(demo: Demo, out: Path) -> Made:
    option = f"adapter_path={demo.adapter}"
    return made(built(_float_base(demo, out), out / "builder-beside", "rtn_last", option))


def section(rows: Sequence[Row], scored: Mapping[str, int]) -> str:
    """The rows as a table of Markdown, under what one has to know to read it."""
    recipe = RECIPES[NAME]
    names = ("onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes")
    intro = _INTRO.format(
        rank=recipe.rank,
        targets=", ".join(recipe.targets),
        steps=recipe.steps,
        name=NAME,
        measured=scored[tables.MEASURED],
        other=scored[tables.OTHER],
        packages=", ".join(f"{name} {version(name)}" for name in names),
    )
    absent = {"int4 merged", "nf4 merged back (vera-edge merge)"} - {row.name for row in rows}
    if absent:
        intro += f"Not measured: {', '.join(sorted(absent))}, for want of the time that calibration takes."
    parts = (tables.filled(intro), tables.long_table(rows).rstrip(), tables.filled(_OLIVE))
    return "\n\n".join(parts)
