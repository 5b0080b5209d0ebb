"""Measure decoding speed in ONNX Runtime GenAI: our exports beside what its own model builder writes.

    scripts/bench_decode [--tokens 48] [--rounds 7] [--threads N] [--llama [--layers N]] [--write]

All models are loaded at once and take turns, a round each, so that what else the machine does falls on all of
them alike; a ratio is the median over rounds of two speeds of the same round. By default the model is the
demo's; `--llama` takes a Llama with random weights (hidden 2048, 16 layers unless told, rank 256), int8 base.
`--write` writes docs/decode-table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scripts.prepare_demo import ROOT, cache_folder, prepare
from vera_edge import target

PAGE = ROOT / "docs" / "decode-table.md"
BUILDER = "GenAI's builder, int4"
PROMPT = 32  # tokens
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Way:
    """One way to run the model. `against`: the way its ratio is taken to."""

    name: str
    mode: str
    weights: str
    against: str
    options: Mapping[str, str]


DEMO = (
    Way("merged int4", "merged", "int4", BUILDER, {}),
    Way("merged int8", "merged", "int8", "merged int4", {}),
    Way("branch int4", "branch", "int4", "merged int4", {}),
    Way("branch int4, int4 projections", "branch", "int4", "merged int4", {"projections": "int4"}),
    Way("branch int8", "branch", "int8", "merged int8", {}),
    Way("branch int8, int4 projections", "branch", "int8", "merged int8", {"projections": "int4"}),
    Way("branch int8, fp32 projections", "branch", "int8", "merged int8", {"projections": "fp32"}),
    Way("branch nf4", "branch", "nf4", "merged int8", {}),
)
BIG = (
    Way("merged int8", "merged", "int8", "merged int8", {}),
    Way("branch int8", "branch", "int8", "merged int8", {}),
    Way("branch int8, int4 projections", "branch", "int8", "merged int8", {"projections": "int4"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; all cores by default")
    parser.add_argument("--llama", action="store_true", help="the random Llama instead of the demo")
    parser.add_argument("--layers", type=int, default=16, help="of the random Llama")
    parser.add_argument("--only", nargs="*", help="these ways alone")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    out = cache_folder() / "bench-decode" / (f"llama-{given.layers}" if given.llama else "demo")
    base, adapter = _llama(out, given.layers) if given.llama else (prepare().base, prepare().adapter)
    ways = [way for way in (BIG if given.llama else DEMO) if not given.only or way.name in given.only]
    folders = {} if given.llama else {BUILDER: _built(out / "builder")}
    for way in ways:
        folders[way.name] = _exported(way, base, adapter, out)
    speeds = measure(folders, given.tokens, given.rounds, given.threads)
    table = render(ways, folders, speeds)
    print(table)
    if given.write:
        PAGE.write_text(table, encoding="utf-8")


def _exported(way: Way, base: Path, adapter: Path, out: Path) -> Path:
    folder = out / way.name.replace(", ", "-").replace(" ", "-")
    _say(f"{way.name}: exporting")
    target.export(
        base, [(adapter, 1.0)], folder, mode=way.mode, weights=way.weights, options=way.options, force=True
    )
    return folder


def _built(folder: Path) -> Path:
    """The demo's float base as GenAI's own builder quantizes it to int4."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    source, cache = str(prepare().float_base), str(folder / "cache")
    options = parse_extra_options(None, source, str(folder), "int4", "cpu", cache, [])
    create_model(None, source, str(folder), "int4", "cpu", cache, **options)
    return folder


def _llama(out: Path, layers: int) -> tuple[Path, Path]:
    """A Llama with random weights and a VeRA adapter of rank 256 on its seven linears."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import tiny

    base, adapter = out / "base", out / "adapter"
    if not (base / "config.json").is_file():
        torch.manual_seed(0)
        tiny.save(LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=layers)), base)
    if not (adapter / "adapter_config.json").is_file():
        tiny.make_adapter(base, adapter, rank=256)
    return base, adapter


def measure(
    folders: Mapping[str, Path], tokens: int, rounds: int, threads: int | None
) -> dict[str, list[float]]:
    """Tokens per second of greedy decoding after a prompt of 32, by way, one value for each round."""
    import onnxruntime_genai as og

    models: dict[str, tuple[Any, Any]] = {}
    for name, folder in folders.items():
        config = og.Config(str(folder))
        if threads is not None:
            settings = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            config.overlay(json.dumps(settings))
        model = og.Model(config)
        adapters, file = og.Adapters(model), folder / "adapters" / "default.onnx_adapter"
        if file.is_file():
            adapters.load(str(file), "default")
        models[name] = (model, adapters if file.is_file() else None)
    speeds: dict[str, list[float]] = {name: [] for name in folders}
    for number in range(rounds + 1):
        for name, (model, adapters) in models.items():
            speed = _decode(model, adapters, tokens)
            if number:  # the first round warms up
                speeds[name].append(speed)
    return speeds


def _decode(model: Any, adapters: Any, tokens: int) -> float:
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    length = PROMPT + tokens + 1
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    if adapters is not None:
        generator.set_active_adapter(adapters, "default")
    generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32)[None])
    generator.generate_next_token()
    started = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    return tokens / (time.perf_counter() - started)


def render(ways: Sequence[Way], folders: Mapping[str, Path], speeds: Mapping[str, list[float]]) -> str:
    """The measurements as a page of Markdown."""
    lines = [
        "# Decoding speed",
        "",
        "Written by `scripts/bench_decode`: greedy decoding in ONNX Runtime GenAI, all models in one run,",
        "taking turns. A ratio is the median over rounds of the two speeds of a round.",
        "",
        "| way | MB on disk | tokens/s, median | best | ratio | to |",
        "|---|---|---|---|---|---|",
    ]
    against = {way.name: way.against for way in ways}
    for name, found in speeds.items():
        size = sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file())
        other = against.get(name, name)
        ratio = ""
        if other in speeds and other != name:
            pairs = zip(found, speeds[other], strict=True)
            ratio = f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}"
        lines.append(
            f"| {name} | {size / 1e6:,.0f} | {statistics.median(found):.1f} | {max(found):.1f} | {ratio} | "
            f"{other if ratio else ''} |"
        )
    load = os.getloadavg()[0]
    lines += [
        "",
        f"{len(next(iter(speeds.values())))} rounds on {os.cpu_count()} cores ({platform.machine()}), load "
        f"{load:.1f}.",
        f"onnxruntime {version('onnxruntime')}, onnxruntime-genai {version('onnxruntime-genai')}.",
        "",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
