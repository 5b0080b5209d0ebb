"""README.md of a released bundle, written from its evidence and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

from vera_edge.bundle.contents import Manifest
from vera_edge.device.runtime.opened import llama_command
from vera_edge.releasing.attestation import Material
from vera_edge.releasing.evidence import Evidence
from vera_edge.releasing.job import ReleaseJob

_TITLES = {
    "kl_by_position.svg": "Mean KL by position",
    "kl_histogram.svg": "Share of tokens by KL divergence",
}
_MEASURED = ("embeddings", "classes", "labels", "values")
# Of embeddings, classes, labels and values, all against the model as trained.
_ENCODER_FIGURES = {
    "cosine": "mean cosine with the model as trained",
    "rank_correlation": "rank correlation with the model as trained",
    "overlap": "nearest texts that are the same",
    "kl": "mean KL from the model as trained, nats",
    "agreement": "texts with the same answer",
    "relative_error": "mean error in the reference's standard deviations",
    "largest_error": "largest error in the reference's standard deviations",
}
_RUNTIMES = {"onnx": "ONNX Runtime", "genai": "ONNX Runtime GenAI", "gguf": "llama.cpp"}


def render(
    job: ReleaseJob,
    manifest: Manifest,
    evidence: Evidence,
    materials: tuple[Material, ...],
    tools: Mapping[str, str],
) -> bytes:
    """The model card as Markdown with Hugging Face's front matter, in UTF-8."""
    source = (files("vera_edge.releasing") / "card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    release = job.recipe.file.release
    text = environment.from_string(source).render(
        name=release.name,
        version=release.version,
        adapter=job.adapter.id,
        base=job.adapter.base,
        licence=job.adapter.licence,
        runtime=_RUNTIMES.get(job.variant.target, job.variant.target),
        mode=manifest.mode,
        weights=manifest.weights,
        evidence=evidence,
        figures=_figures(evidence),
        limits=sorted(evidence.limits.items()),
        plots=[(name, _TITLES[name]) for name in sorted(evidence.plots)],
        materials=materials,
        tools=sorted(tools.items()),
        gguf=llama_command(manifest, str) if manifest.is_gguf else None,
    )
    return text.encode()


def _figures(evidence: Evidence) -> list[tuple[str, str]]:
    report = json.loads(evidence.report)
    figures = _of_text(report, evidence) if "fidelity" in report else _of_encoder(report)
    if evidence.retained is not None:
        figures.insert(2, ("share of the effect kept", f"{evidence.retained:.1%}"))
    text = report["text"]
    texts = "" if "fidelity" in report else f"{text['windows']} texts, "
    figures.append(("measured on", f"{texts}{text['tokens']} tokens of {text['source']}"))
    return figures


def _of_text(report: Mapping[str, Any], evidence: Evidence) -> list[tuple[str, str]]:
    fidelity = report["fidelity"]
    figures = [
        ("mean KL from the model as trained", f"{evidence.kl:.3g} nats"),
        ("top-1 agreement", f"{fidelity['same_top1']['value']:.1%}"),
        ("perplexity", f"{fidelity['perplexity']['value']:.4g}"),
        ("perplexity of the model as trained", f"{fidelity['reference_perplexity']['value']:.4g}"),
    ]
    if report["effect"] is not None:
        figures.insert(1, ("the adapter's effect", f"{report['effect']['kl']['mean']['value']:.3g} nats"))
    return figures


def _of_encoder(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each estimate, with the base's where there is one: what would be left without the adapter."""
    measured = next(report[name] for name in _MEASURED if report[name] is not None)
    figures = []
    for name, words in _ENCODER_FIGURES.items():
        if name in measured:
            figures.append((words, f"{measured[name]['value']:.4g}"))
            if report["effect"] is not None:
                figures.append((f"{words}, without the adapter", f"{report['effect'][name]['value']:.4g}"))
    return figures
