"""The rows of bench_scale: which command each runs, on which base, and what it reads of another's output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import bench_llama_cpp
from scripts.bench_models import Size
from scripts.bench_scale_flops import calibrated_export, merge
from vera_edge.requantize.effort import EFFORTS, Effort

Command = list[str | Path]
_DRIFT_TOKENS = 4000


@dataclass(frozen=True)
class Place:
    """Where a row works. `other`: the output of the row that it needs."""

    size: Size
    base: Path
    adapter: Path
    out: Path
    other: Path
    llama_cpp: Path


@dataclass(frozen=True)
class Row:
    """A measured command. bases: it runs on each of these; needs: the row whose output it reads.

    exits: the exit codes of a command that did its work. beside: the row of ours that it is a peer of.
    flops: operations that it can't do without, of a size and a rank. opened: `out` has to be there before.
    """

    title: str
    command: Callable[[Place], Command]
    bases: tuple[str, ...] = ("nf4",)
    needs: str | None = None
    exits: tuple[int, ...] = (0,)
    beside: str | None = None
    flops: Callable[[Size, int], float] | None = None
    opened: bool = False
    environment: Callable[[Place], Mapping[str, str]] = field(default=lambda place: {})


def _ours(command: str, *words: str | Path) -> Command:
    return [sys.executable, "-m", "vera_edge", command, *words, "-q", "--json"]


def _export(*words: str) -> Callable[[Place], Command]:
    return lambda at: _ours("export", at.base, at.adapter, "-o", at.out, *words)


def _merge(at: Place) -> Command:
    # To nearest: what is calibrated costs what an int4 export does.
    return _ours("merge", at.base, at.adapter, "-o", at.out, "--method", "rtn")


def _peft(at: Place) -> Command:
    return [sys.executable, "-m", "scripts.bench_scale_workers", "peft", at.base, at.adapter, at.out]


def _decode(at: Place) -> Command:
    return [sys.executable, "-m", "scripts.bench_scale_workers", "decode", at.other]


def _drift(*words: str) -> Callable[[Place], Command]:
    # Models of more than half of it in float32 are read layer by layer, as where there isn't any more.
    words = ("--tokens", str(_DRIFT_TOKENS), "--max-memory", "6GB", *words)
    return lambda at: _ours("drift", at.adapter, at.other, "--base", at.base, *words)


def _plan(at: Place) -> Command:
    return _ours(
        "plan", at.base, at.adapter, "-o", at.out / "plan.json", "--max-size", str(plan_bytes(at.size))
    )


def plan_bytes(size: Size) -> int:
    """A size for a plan to keep within: halfway between all of int4 and all of int8, and 10 MB for the rest.

    Blocks of 32 take 5.125 and 9 bits a weight, a float32 scale and int4's zero point included.
    """
    return int((size.linear_weights + size.table_weights) * (5.125 + 9) / 2 / 8 + 10e6)


def _builder(at: Place) -> Command:
    words: Command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", at.base, "-o", at.out]
    return [*words, "-p", "int4", "-e", "cpu", "-c", at.out.parent / "builder-cache"]


def _llama_convert(at: Place) -> Command:
    script = at.llama_cpp / bench_llama_cpp.CONVERTER
    return [sys.executable, script, "--outtype", "bf16", "--outfile", at.out / "model.gguf", at.base]


def _llama_convert_environment(at: Place) -> Mapping[str, str]:
    return {"PYTHONPATH": str(at.llama_cpp / bench_llama_cpp.CONVERTER.parent / "gguf-py")}


def _llama_quantize(at: Place) -> Command:
    python, script = at.llama_cpp / "bin" / "python", bench_llama_cpp.__file__
    return [python, script, at.other / "model.gguf", "--quantize", at.out / "model.gguf"]


def _int4(effort: str) -> Row:
    def flops(size: Size, rank: int) -> float:
        return sum(calibrated_export(size, Effort.named(effort)).values()) + merge(size, rank)

    return Row(f"export int4, {effort} effort", _export("--weights", "int4", "--effort", effort), flops=flops)


def rows() -> dict[str, Row]:
    """All rows by name, in the order in which they are measured."""
    return {
        "merge": Row("merge, rounded to nearest", _merge, ("nf4", "bf16"), flops=merge),
        "peft": Row("PEFT's merge", _peft, ("nf4", "bf16"), beside="merge"),
        "int8": Row("export int8", _export("--weights", "int8")),
        "decode": Row("the int8 export in ONNX Runtime GenAI", _decode, needs="int8"),
        "drift": Row("drift of the int8 export", _drift(), needs="int8", exits=(0, 3)),
        "drift-merge": Row(
            "drift of the merge, on exact values", _drift("--exact"), ("nf4",), "merge", exits=(0, 3)
        ),
        "branch": Row("export as a branch", _export("--mode", "branch", "--weights", "same")),
        "builder": Row("GenAI's builder, int4", _builder, ("bf16",), beside="int4-default"),
        "gguf": Row(
            "export GGUF Q4_0, rounded to nearest",
            _export("--target", "gguf", "--weights", "q4_0", "--method", "rtn"),
            ("bf16",),
        ),
        "llama-convert": Row(
            "llama.cpp's converter",
            _llama_convert,
            ("bf16",),
            beside="gguf",
            opened=True,
            environment=_llama_convert_environment,
        ),
        "llama-quantize": Row(
            "llama.cpp's quantizer, Q4_0",
            _llama_quantize,
            ("bf16",),
            "llama-convert",
            beside="gguf",
            opened=True,
        ),
        **{f"int4-{effort}": _int4(effort) for effort in EFFORTS},
        "plan": Row("plan", _plan, opened=True),
    }
