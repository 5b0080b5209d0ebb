#!/usr/bin/env python
"""Writes docs/agreement.md: how near PEFT's own forward every export of the tiny models is. Some minutes.

python -m scripts.make_agreement_table
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from tests import exported
from tests.unit.exporters import test_decoder as decoders
from tests.unit.exporters import test_encoder as encoders
from vera_edge.exporting import target

PAGE = Path(__file__).resolve().parents[1] / "docs" / "agreement.md"
WAYS = (
    ("merged", "fp32"),
    ("branch", "fp32"),
    ("merged", "int8"),
    ("branch", "int8"),
    ("branch", "int4"),
)
HEAD = """\
# PEFT's forward and every export

The largest difference of an output from PEFT's own unmerged forward, relative to the largest output, by way
to ship. Tiny random models of each architecture (hidden 32 or 64), a VeRA adapter on their linears, run in
ONNX Runtime; decoders on 48 tokens, encoders on three inputs. *adapter* is the same difference when the
adapter is left out: what would be seen if an export had lost it. Random weights are harder to round than
trained ones, and 4 bits are rounded to nearest here: what is lost on a real model is in
[drift-table.md](drift-table.md). Written by `python -m scripts.make_agreement_table`.

"""
Measure = Callable[[Path, str, str], float]


def main() -> None:
    """Export, run and compare everything; write the page."""
    ways = [f"{weights} {mode}" for mode, weights in WAYS]
    lines = [f"| model | {' | '.join(ways)} | adapter |", "|---" + "|--:" * (len(ways) + 1) + "|"]
    with tempfile.TemporaryDirectory() as work:
        models = chain(_decoders(Path(work)), _encoders(Path(work)))
        for number, (name, effect, measure) in enumerate(models):
            out = Path(work) / f"out-{number}"
            found = [measure(out / f"{mode}-{weights}", mode, weights) for mode, weights in WAYS]
            lines.append(f"| {name} | " + " | ".join(f"{error:.1e}" for error in (*found, effect)) + " |")
            print(lines[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


def _decoders(work: Path) -> Iterator[tuple[str, float, Measure]]:
    ids = exported.tokens()
    for name in decoders.FAMILIES:
        (work / name).mkdir()
        base, adapter = decoders.family_base(name, work / name)
        truth = exported.peft_logits(base, adapter, ids)

        effect = exported.error(exported.peft_logits(base, adapter, ids, active=False), truth)
        yield name, effect, partial(_decoder_error, base, adapter, truth)


def _decoder_error(
    base: Path, adapter: Path, truth: exported.Float32, out: Path, mode: str, weights: str
) -> float:
    made = target.export(base, [(adapter, 1.0)], out, mode=mode, weights=weights)
    return exported.error(exported.logits(out, exported.tokens(), made.adapters.get("default")), truth)


def _encoders(work: Path) -> Iterator[tuple[str, float, Measure]]:
    for name, family in encoders.MODELS.items():
        base = work / name / "base"
        family.make().save_pretrained(base)
        adapter = family.adapted(base, work / name / "adapter")
        target.export(base, [(adapter, 1.0)], work / name / "first")
        first = encoders.Case(family, base, adapter, work / name / "first")
        feeds = first.feeds(3, 5)
        effect = exported.error(first.truth(feeds, active=False), first.truth(feeds))

        yield f"{name}, `{family.model}`", effect, partial(_encoder_error, first)


def _encoder_error(first: encoders.Case, out: Path, mode: str, weights: str) -> float:
    target.export(first.base, [(first.adapter, 1.0)], out, mode=mode, weights=weights)
    case = encoders.Case(first.family, first.base, first.adapter, out)
    return case.error(case.feeds(3, 5))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    main()
