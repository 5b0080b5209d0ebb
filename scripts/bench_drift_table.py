"""The drift tables as Markdown, and where they are written."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from scripts.bench_drift_rows import BARE, PEFT, Row
from scripts.prepare_demo import ROOT
from vera_edge.device.check.hardware import processor

PAGE = ROOT / "docs" / "drift-table.md"
MARKS = ("<!-- drift-table: written by scripts/bench_drift -->", "<!-- end of drift-table -->")
MEASURED, OTHER = "reference", "code"  # the held-out text of the adapter's own kind, and another kind
_REST = "## What each bit buys"
LLAMA, LORA, SECOND = "## In llama.cpp", "## A LoRA adapter", "## A second decoder"
_LAST = (LLAMA, LORA, SECOND)  # the last sections, in this order, each with a run of its own that writes it
_INTRO = """
Every method, and other tools', at the bytes they take: the same model and adapter as above, on
{measured} tokens of the Python reference that neither training nor calibration saw, and on {other} of
Python code. *Bits a weight* are those of the linear layers, scales and zero points as the format stores
them; ONNX Runtime's are float32. Bold: no row of as few bits loses less. Ours, and those of ONNX Runtime
GenAI's builder, are exports run in ONNX Runtime, which rounds activations to 8 bits beside integer
weights. Rows merged back into NF4, HQQ's and llama.cpp's are the weights alone, run in torch in float32,
so what their runtimes round isn't in them; PEFT's runs in bitsandbytes' kernels. Most layers of this
model are 576 inputs wide, no multiple of 256, and llama.cpp stores those in other formats than Q4_K. Its
rows keep the head in Q8_0, ours in int8 (merged back into NF4: as the base has it), HQQ's in float32.
"""


def short_table(rows: Sequence[Row], scored: int) -> str:
    """The README's table and what one has to know to read it."""
    lines = [
        "| Way to ship | mean KL | of the effect | top-1 agreement | perplexity | on disk, MB | tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = row.texts[MEASURED]
        speed = f"{row.speed:.0f}" if row.speed is not None else ""
        lines.append(
            f"| {row.name} | {found.kl:.2g} | {found.share:.1%} | {found.top1:.1%} "
            f"| {found.perplexity:.3f} | {_size(row)} | {speed} |"
        )
    return "\n".join([*lines, "", _footnote(scored, rows[0].texts[MEASURED].reference_perplexity), ""])


def long_table(rows: Sequence[Row]) -> str:
    """Every row, the smallest first: what each bit buys. Rows that no other beats in both are bold."""
    lines = [
        "| Way to ship | bits a weight | on disk, MB | mean KL | of the effect | retained | flips | top-1 "
        "| on code: mean KL | of the effect | retained |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    bare = [row for row in rows if row.name == BARE]
    ordered = sorted(
        (row for row in rows if row not in bare), key=lambda row: (row.bits, row.texts[MEASURED].kl)
    )
    best = float("inf")
    for row in (*ordered, *bare):
        found, other = row.texts[MEASURED], row.texts[OTHER]
        name, best = (f"**{row.name}**", found.kl) if found.kl < best else (row.name, best)
        bits = f"{row.bits:.2f}" if row.bits else ""
        lines.append(
            f"| {name} | {bits} | {_size(row)} | {found.kl:.2g} ± {found.kl_error:.1g} "
            f"| {found.share:.1%} | {1 - found.share:.3f} | {found.flips:.1%} | {found.top1:.1%} "
            f"| {other.kl:.2g} | {other.share:.1%} | {1 - other.share:.3f} |"
        )
    return "\n".join([*lines, ""])


def _size(row: Row) -> str:
    if row.size is None:
        return "can't be saved" if row.name == PEFT else ""
    return f"{row.size / 1e6:.0f}"


def _footnote(scored: int, perplexity: float) -> str:
    packages = ", ".join(f"{n} {version(n)}" for n in ("onnxruntime", "torch", "peft", "bitsandbytes"))
    return filled(
        "SmolLM2-135M-Instruct in NF4 with a VeRA adapter of rank 256 on all seven linears; "
        f"{scored} tokens of held-out text. KL in nats, from the model as trained (NF4 base, exact values "
        f"in float32, adapter unmerged in PEFT; perplexity {perplexity:.3f}) to what is shipped; "
        "*of the effect* divides it by the KL to the base without the adapter. 4-bit weights of ours are "
        "rounded as the commands do by default, calibrated on text of the same kind, in neither the training "
        "nor the measured text, and on built-in text. Speed: greedy decoding on "
        f"{os.cpu_count()} cores of {processor()[0]}; PEFT's row runs in torch. {packages}."
    )


def rest(long: str, encoder: str, scored: Mapping[str, int]) -> str:
    """What stands under the short table in docs/drift-table.md."""
    intro = filled(_INTRO.format(measured=scored[MEASURED], other=scored[OTHER]))
    return "\n".join((_REST, "", intro, "", long, "## A second model", "", encoder))


def write(short: str | None, below: str | None) -> None:
    """Put the short table between the marks in README.md and into docs, and `below` under it there.

    What is None stays as it is.
    """
    page, sections = _sections()
    above, found, kept = page.partition(_REST)
    if short is not None:
        above = f"# Drift, size and speed of each way to ship\n\n{short}\n"
    parts = (above.rstrip(), (below or found + kept).rstrip(), *sections.values())
    PAGE.write_text("\n\n".join(part for part in parts if part).rstrip() + "\n", encoding="utf-8")
    if short is None:
        return
    readme = ROOT / "README.md"
    before, after = readme.read_text(encoding="utf-8").split(MARKS[0])
    after = after.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{short}{MARKS[1]}{after}", encoding="utf-8")


def write_section(title: str, section: str) -> None:
    """Put one of the last sections into docs/drift-table.md; `title`: one of _LAST."""
    page, sections = _sections()
    sections[title] = f"{title}\n\n{section.rstrip()}"
    parts = [page.rstrip(), *(sections[one] for one in _LAST if one in sections)]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _sections() -> tuple[str, dict[str, str]]:
    """docs/drift-table.md without its last sections, and these by title."""
    page, found = PAGE.read_text(encoding="utf-8"), dict[str, str]()
    for title in reversed(_LAST):
        page, mark, text = page.partition(title)
        if mark:
            found[title] = (mark + text).rstrip()
    return page, {title: found[title] for title in _LAST if title in found}


def filled(text: str) -> str:
    """A paragraph as Markdown in lines of the page's width."""
    return textwrap.fill(" ".join(text.split()), 110, break_long_words=False)
