"""The LoRA section of docs/drift-table.md: the QLoRA adapter of examples/lora, shipped by us and by others.

Olive is taken from where Python finds it (`pip install olive-ai`); without it its row is left out.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
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
and Olive read no NF4: they were given a float32 folder of its exact values, so what they lose is their own
rounding. With `adapter_path` the builder rounds the LoRA's own matrices to int4 as it does every product.
Olive: the builder's float32 graph, `generate-adapter`, then `quantize --algorithm rtn`, and the
`.onnx_adapter` that it wrote given as inputs. {packages}.
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
    if find_spec("olive"):
        yield Way("Olive, int4 rtn, adapter as inputs", partial(_olive, demo, out), _olive_version())


def _olive_version() -> str:
    return f"olive-ai {version('olive-ai')}"


def _float_base(demo: Demo, out: Path) -> Path:
    """The NF4 base's exact values as a float32 folder."""
    folder = out / "base-fp32"
    if not folder.is_dir():
        merge.perform(merge.prepare_base(demo.base, "fp32"), folder)
    return folder


def _builder_beside(demo: Demo, out: Path) -> Made:
    option = f"adapter_path={demo.adapter}"
    return made(built(_float_base(demo, out), out / "builder-beside", "rtn_last", option))


def _olive(demo: Demo, out: Path) -> Made:
    captured, extracted, rounded = (out / f"olive-{name}" for name in ("captured", "extracted", "rounded"))
    base = _float_base(demo, out)
    _run_olive(
        "capture-onnx-graph", base, captured, "-a", demo.adapter, "--use_model_builder", "--precision", "fp32"
    )
    _run_olive("generate-adapter", captured, extracted)
    _run_olive("quantize", extracted, rounded, "--algorithm", "rtn", "--precision", "int4")
    (adapter,) = extracted.rglob("*.onnx_adapter")
    return made(next(rounded.rglob("model.onnx")).parent, adapter)


def _run_olive(command: str, model: Path, out: Path, *words: object) -> None:
    given = [sys.executable, "-m", "olive", command, "-m", model, "-o", out, *words]
    subprocess.run([str(word) for word in given], check=True, stdout=subprocess.DEVNULL)


def section(rows: Sequence[Row], scored: Mapping[str, int]) -> str:
    """The rows as a table of Markdown, under what one has to know to read it."""
    recipe = RECIPES[NAME]
    names = ["onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes"]
    names += ["olive-ai"] if find_spec("olive") else []
    intro = _INTRO.format(
        rank=recipe.rank,
        targets=", ".join(recipe.targets),
        steps=recipe.steps,
        name=NAME,
        measured=scored[tables.MEASURED],
        other=scored[tables.OTHER],
        packages=", ".join(f"{name} {version(name)}" for name in names),
    )
    filled = textwrap.fill(" ".join(intro.split()), 110, break_long_words=False)
    return f"{filled}\n\n{tables.long_table(rows)}"
