"""The second model of the drift tables: all-MiniLM-L6-v2, an encoder, with a VeRA adapter of its own."""

from __future__ import annotations

import textwrap
from pathlib import Path

from scripts import demo_encoder
from scripts.prepare_demo import Demo
from vera_edge import merge
from vera_edge.drift.assess import Request, assess_any
from vera_edge.drift.encoder_report import EncoderReport
from vera_edge.drift.encoders import EmbeddingDrift
from vera_edge.drift.models import folder_bytes
from vera_edge.weight_rounding import Rounding, merge_to_folder

ROWS = tuple((to, method) for to in ("nf4", "int8") for method in ("rtn", "hqq", "search", "gptq"))


def encoder_table(demo: Demo, out: Path) -> str:
    """Merged into NF4 and LLM.int8 by every method; a Markdown table and what it shows."""
    encoder = demo_encoder.prepare()
    lines = [
        "| Merged into | by | on disk, MB | 1 - cosine | retained | rank correlation | ten nearest kept |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    found = None
    for to, method in ROWS:
        folder = out / "encoder"
        ready = merge.prepare(encoder.base, [(encoder.adapter, 1.0)], to)
        merge_to_folder(ready, folder, Rounding(method, str(demo.calibration_text)), force=True)
        asked = Request(
            encoder.base, folder, str(demo.eval_text), adapters=((encoder.adapter, 1.0),), exact=True
        )
        found = assess_any(asked)
        assert isinstance(found, EncoderReport) and found.embeddings and found.retained
        own = found.embeddings
        lines.append(
            f"| {to} | {method} | {folder_bytes(folder) / 1e6:.0f} | {1 - own.cosine.value:.2g} "
            f"| {found.retained.value:.4f} | {own.rank_correlation.value:.4f} | {own.overlap.value:.1%} |"
        )
    assert isinstance(found, EncoderReport) and isinstance(found.effect, EmbeddingDrift)
    effect = found.effect.cosine.value
    note = (
        "all-MiniLM-L6-v2 (six layers of BERT, 384 wide, float32) with a VeRA adapter of rank 64 on all its "
        "linears, whose vectors are drawn and not trained: it turns the embeddings of "
        f"{found.text.windows} paragraphs of the held-out text by a mean 1 - cosine of {1 - effect:.2g}, "
        "which is the effect that *retained* refers to. Measured on exact values in float32."
    )
    return "\n".join([textwrap.fill(note, 110), "", *lines, ""])
