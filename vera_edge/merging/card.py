"""README.md of a merged model: what was merged into what, and how much of the adapter its format keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vera_edge import __version__
from vera_edge.merging.report import MergeReport
from vera_edge.tasks import task as tasks

_WHAT = {
    "VERA": "plus the deltas of the VeRA adapters below, `W + diag(lambda_b) B diag(lambda_d) A`",
    "LORA": "and what the LoRA adapters below make of them, `W + scale B A`, of a DoRA's magnitude",
}
_OTHER = "as the adapter below makes them"


def text(report: MergeReport, base_name: str, config: Mapping[str, Any]) -> str:
    """The model card as Markdown with Hugging Face's front matter."""
    if not report.adapters:
        return _of_base(report, base_name, config)
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(base_name)}",
        "base_model_relation: merge",
        f"tags: [{report.method.lower()}, peft, merged]",
        "---",
        "",
        f"# {_plain(base_name)}, merged with {_plain(_names(report))}",
        "",
        f"The weights are the base's dequantized values {_WHAT.get(report.method, _OTHER)}, computed in "
        f"float32 and then stored in the formats named here. Made by vera-edge {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_plain(base_name)} |",
        f"| base weights, SHA-256 | `{report.base_digest}` |",
    ]
    for name, digest, weight in report.adapters:
        lines += [f"| adapter | {_plain(name)}, weight {weight:g} |", f"| its SHA-256 | `{digest}` |"]
    if (spec := report.projection) is not None:
        lines += [
            f"| projections | seed {spec['seed']}, rank {spec['rank']}, {spec['rounding']} |",
            f"| their SHA-256 | `{spec['digest']}` |",
        ]
    lines += [
        f"| linear layers | {_formats(report)} |",
        f"| merged layers | {len(report.layers)} |",
        *_survival(report),
        "",
    ]
    if report.warning:
        lines += [f"**Warning.** {report.warning}", ""]
    lines += _loading(config)
    return "\n".join(lines)


def _of_base(report: MergeReport, base_name: str, config: Mapping[str, Any]) -> str:
    """The card of a base alone in another format."""
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(base_name)}",
        "base_model_relation: quantized",
        "---",
        "",
        f"# {_plain(base_name)}, {_formats(report)}",
        "",
        f"The base's weights, rounded by vera-edge {__version__}; no adapter was merged.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_plain(base_name)} |",
        f"| base weights, SHA-256 | `{report.base_digest}` |",
        "",
        *_loading(config),
    ]
    return "\n".join(lines)


def _survival(report: MergeReport) -> list[str]:
    shares = report.survival.to_dict()
    if shares["retained"] is None:
        return []
    return [
        f"| delta over base weights | {shares['delta_size']:.3g} |",
        f"| retained share of the delta | {shares['retained']:.3f} |",
        f"| rounding noise over the delta | {shares['noise']:.3g} |",
    ]


def _loading(config: Mapping[str, Any]) -> list[str]:
    name = tasks.architecture(config)
    auto = tasks.of_class(name).auto_class if tasks.of_class(name).name else "AutoModel"
    if name.endswith("ForConditionalGeneration"):
        auto = "AutoModel"
    return [
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]


def _names(report: MergeReport) -> str:
    return " and ".join(name for name, _, _ in report.adapters)


def _formats(report: MergeReport) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(report.results.items()))


def _plain(text: str) -> str:
    """A name on one line, with nothing that Markdown or HTML would read."""
    return "".join(mark for mark in text if mark.isprintable() and mark not in "|`<>[]*\\")
