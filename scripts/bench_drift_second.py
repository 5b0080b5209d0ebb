"""The section of docs/drift-table.md on a second decoder, of another family than SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from scripts import bench_drift_table as tables
from scripts.bench_drift_rows import Row, Way
from scripts.bench_drift_ways import short
from scripts.second_decoder import PACKAGE, RECIPE, VERSION, SecondDemo

_LEFT_OUT = ("fp32 merged",)  # tells nothing new
_INTRO = """
Gemma 3 270M ({package} {number} of the registry, a Q4_K_M that transformers reads) in NF4 with double
quantization: windows of 512 tokens in five layers of six, normed queries and keys, and a vocabulary of
262,144 tokens whose table is most of the model. The VeRA adapter of rank {rank} on all seven linears was
trained on the NF4 base by {steps} steps of {window} tokens of the Python reference (`python -m
scripts.second_decoder`; the licence of the weights lets nobody ship it here). {measured} tokens of the
reference that it wasn't trained on, and {other} of Python code; rows are measured as those above, int4
calibrated on the same text as there. ONNX Runtime GenAI's builder has no row: of onnxruntime-genai 0.18.0 it
doesn't read this model's RoPE, whose parameters differ by layer (`KeyError: 'rope_type'`). {packages}.
"""


def ways(demo: SecondDemo, out: Path) -> Iterator[Way]:
    """Our ways to ship the adapter, and PEFT's."""
    yield from (way for way in short(demo, out) if way.name not in _LEFT_OUT)


def section(rows: Sequence[Row], scored: Mapping[str, int]) -> str:
    """The rows as a table of Markdown, under what one has to know to read it."""
    names = ("onnxruntime", "transformers", "peft", "bitsandbytes")
    intro = _INTRO.format(
        package=PACKAGE,
        number=VERSION,
        rank=RECIPE.rank,
        steps=RECIPE.steps,
        window=RECIPE.window,
        measured=scored[tables.MEASURED],
        other=scored[tables.OTHER],
        packages=", ".join(f"{name} {version(name)}" for name in names),
    )
    return f"{tables.filled(intro)}\n\n{tables.long_table(rows).rstrip()}"
