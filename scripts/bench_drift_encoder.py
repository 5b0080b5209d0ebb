"""The second model of the drift tables: all-MiniLM-L6-v2, an encoder, with a VeRA adapter of its own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from scripts import demo_encoder
from scripts.demo_encoder import DemoEncoder
from scripts.prepare_demo import Demo
from vera_edge import merging as merge
from vera_edge.device.runtime.encoder import Encoded, Encoder
from vera_edge.exporting import target
from vera_edge.measuring import encoders, opened_reference
from vera_edge.measuring.artefact import folder_bytes
from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.measuring.encoder_assess import cut_texts
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.encoders import EmbeddingDrift
from vera_edge.reference.model import TorchReference
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.text import windows
from vera_edge.text.mixture import Mixture

EXPORTS = (("fp32", "float"), ("int8", "float"), ("int8", "dynamic"), ("int8", "static"))
ROWS = tuple((to, method) for to in ("nf4", "int8") for method in ("rtn", "hqq", "search", "gptq"))


def encoder_table(demo: Demo, out: Path) -> str:
    """Merged into NF4 and LLM.int8 by every method, and exported; Markdown tables and what they show."""
    encoder = demo_encoder.prepare()
    lines = [
        "| Merged into | by | on disk, MB | 1 - cosine | retained | rank correlation | ten nearest kept |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    found = None
    for to, method in ROWS:
        folder = out / "encoder"
        ready = merge.prepare(encoder.base, [(encoder.adapter, 1.0)], to)
        merge_to_folder(ready, folder, Rounding(method, Mixture.of(str(demo.calibration_text))), force=True)
        asked = DriftRequest(
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
    parts = [textwrap.fill(note, 110), "", *lines, "", *_export_table(encoder, demo, out), ""]
    return "\n".join(parts)


def _export_table(encoder: DemoEncoder, demo: Demo, out: Path) -> list[str]:
    """The same model exported to ONNX, as `vera_edge.device` runs it; a Markdown table and what it shows."""
    trained = opened_reference.open_trained(encoder.base, adapter_paths=[(encoder.adapter, 1.0)])
    text = windows.read_text(demo.eval_text)
    texts = cut_texts(text, windows.open_tokenizer(encoder.base), windows.WINDOW)
    assert isinstance(trained.runner, TorchReference) and isinstance(trained.base, TorchReference)
    reference, base = (np.stack([one.embed(ids) for ids in texts]) for one in (trained.runner, trained.base))
    effect = encoders.embedding_distances(reference, base)
    lines = [
        "| Exported | reads | on disk, MB | 1 - cosine | retained | rank correlation | ten nearest kept |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for weights, activations in EXPORTS:
        folder, options = out / "encoder", {"activations": activations}
        rounding = Rounding("rtn", str(demo.calibration_text))
        target.export(
            encoder.base,
            [(encoder.adapter, 1.0)],
            folder,
            weights=weights,
            options=options,
            force=True,
            rounding=rounding,
        )
        opened = Encoder.open(folder, threads=1)
        found = opened.outputs([Encoded(ids, np.zeros_like(ids)) for ids in texts], batch=1)
        own = encoders.compare_embeddings(reference, found)
        kept = encoders.retained(encoders.embedding_distances(reference, found), effect)
        assert kept is not None
        lines.append(
            f"| {weights} | {activations} | {folder_bytes(folder) / 1e6:.0f} | {1 - own.cosine.value:.2g} "
            f"| {kept.value:.4f} | {own.rank_correlation.value:.4f} | {own.overlap.value:.1%} |"
        )
    note = (
        "The same model exported to ONNX, weights rounded to nearest, run text by text (*reads* is what "
        "`--activations` says). Beside float activations int8 weights have a scale for each 32 inputs "
        "(`MatMulNBits`); dynamic and static activations are uint8 of one scale for a tensor, and their "
        "weights have one for each row."
    )
    return [textwrap.fill(note, 110), "", *lines]
