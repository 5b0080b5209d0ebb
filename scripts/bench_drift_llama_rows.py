"""The section of docs/drift-table.md on GGUF: our rounding and llama.cpp's own, both run in llama.cpp."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from scripts import bench_drift_table as tables
from scripts import bench_llama_cpp
from scripts.bench_drift_rows import Made, Row, Way
from scripts.bench_drift_ways import rounding_code
from scripts.prepare_demo import Demo
from vera_edge.device.check.hardware import processor
from vera_edge.device.llama.runner import LlamaRunner, library
from vera_edge.exporting import target
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.text.mixture import Mixture

# llama.cpp's name of a file's type. Of F16 and Q8_0 ours are its bytes.
TYPES = ("Q4_0", "Q4_1", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
_ALIKE = ("Q8_0", "F16")
_ENDS = ("token_embd.weight", "output.weight")
_INTRO = """
The first model and adapter once more, as GGUF files run by llama.cpp itself (llama-cpp-python {llama},
compiled for {processor}), so that all it rounds as it runs is in the figures: what quantized layers read,
to 8 bits, and keys and values, to float16. {measured} tokens of the Python reference and {other} of
Python code. *Ours*: the weights rounded with compensation, calibrated as the rows above. *Its own*:
llama.cpp's quantizer on the merged model in F16, without an importance matrix. Of Q8_0 and F16 both are
the same bytes. Rows of 576 aren't divided by 256, so most layers of the K types are what llama.cpp stores
instead; its IQ4_NL has more bits in some layers, ours in none.
"""


def ways(demo: Demo, out: Path) -> Iterator[Way]:
    """Every type, rounded by us and by llama.cpp's own quantizer."""
    facts = f"llama-cpp-python {version('llama-cpp-python')}"
    for kind in TYPES:
        name = f"{kind}, ours" if kind not in _ALIKE else kind
        yield Way(name, partial(_ours, demo, out, kind), f"{facts} {rounding_code()}")
        if kind not in _ALIKE:
            yield Way(f"{kind}, llama.cpp's own", partial(_theirs, demo, out, kind), facts)


def _exported(demo: Demo, out: Path, kind: str) -> Path:
    made = target.export(
        demo.base,
        [(demo.adapter, 1.0)],
        out / f"ours-{kind}",
        target="gguf",
        weights=kind.lower(),
        force=True,
        rounding=Rounding(None, Mixture.of(str(demo.calibration_text))),
    )
    return made.model


def _ours(demo: Demo, out: Path, kind: str) -> Made:
    return _opened(_exported(demo, out, kind))


def _theirs(demo: Demo, out: Path, kind: str) -> Made:
    source, made = out / "ours-F16" / "model.gguf", out / f"llama-{kind}.gguf"
    if not source.is_file():
        _exported(demo, out, "F16")
    bench_llama_cpp.quantize(library(), str(source), str(made), kind)
    return _opened(made)


def _opened(path: Path) -> Made:
    from gguf import GGUFReader

    stored = weights = 0
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and tensor.name not in _ENDS:
            stored, weights = stored + int(tensor.n_bytes), weights + int(tensor.n_elements)
    return Made(LlamaRunner(path), 8 * stored / weights, path.stat().st_size)


def section(rows: Sequence[Row], scored: Mapping[str, int]) -> str:
    """The rows as a table of Markdown, under what one has to know to read it."""
    intro = _INTRO.format(
        llama=version("llama-cpp-python"),
        processor=processor()[0],
        measured=scored[tables.MEASURED],
        other=scored[tables.OTHER],
    )
    filled = textwrap.fill(" ".join(intro.split()), 110, break_long_words=False)
    return f"{filled}\n\n{tables.long_table(rows).rstrip()}"
