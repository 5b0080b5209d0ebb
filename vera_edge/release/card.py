"""README.md of a released bundle, written from its evidence and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

import jinja2

from vera_edge.bundle import Manifest
from vera_edge.release.attestation import Material
from vera_edge.release.evidence import Evidence
from vera_edge.release.job import Job

_TITLES = {
    "kl_by_position.svg": "Mean KL by position",
    "kl_histogram.svg": "Share of tokens by KL divergence",
}
_RUNTIMES = {"onnx": "ONNX Runtime", "genai": "ONNX Runtime GenAI"}


def render(
    job: Job,
    manifest: Manifest,
    evidence: Evidence,
    materials: tuple[Material, ...],
    tools: Mapping[str, str],
) -> bytes:
    """The model card as Markdown with Hugging Face's front matter, in UTF-8."""
    source = (files("vera_edge.release") / "card.md.j2").read_text(encoding="utf-8")
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
    )
    return text.encode()


def _figures(evidence: Evidence) -> list[tuple[str, str]]:
    report = json.loads(evidence.report)
    fidelity, text = report["fidelity"], report["text"]
    figures = [
        ("mean KL from the model as trained", f"{evidence.kl:.3g} nats"),
        ("top-1 agreement", f"{fidelity['same_top1']['value']:.1%}"),
        ("perplexity", f"{fidelity['perplexity']['value']:.4g}"),
        ("perplexity of the model as trained", f"{fidelity['reference_perplexity']['value']:.4g}"),
    ]
    if report["effect"] is not None:
        figures.insert(1, ("the adapter's effect", f"{report['effect']['kl']['mean']['value']:.3g} nats"))
    if evidence.retained is not None:
        figures.insert(2, ("share of the effect kept", f"{evidence.retained:.1%}"))
    figures.append(("measured on", f"{text['tokens']} tokens of {text['source']}"))
    return figures
