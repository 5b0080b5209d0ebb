"""Measure what a side-branch costs, and where: the demo's model and a larger Llama with random weights.

    scripts/bench_branch [--tokens 24] [--rounds 3] [--loads 4] [--threads N] [--layers 16] [--only TEXT]
                         [--keep] [--write]

The Llama has a hidden size of 2048, and adapters on its seven linears: VeRA's of rank 256 beside int8, LoRA's
of rank 16 beside int4. The
profile tells what part of a step each kind of node takes; ONNX Runtime's profiler slows small nodes down, so
shares of the branch are upper bounds. `--write` puts both tables into docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench_turns import Row, Worker, footnote, genai, measure, say, table, write_section
from scripts.prepare_demo import cache_folder, prepare
from vera_edge.cores import available_cores
from vera_edge.exporting import target
from vera_edge.measuring.artefact import folder_bytes
from vera_edge.rounding.weight_rounding import Rounding

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LORA_RANK = 16
PAST, STEPS = 64, 30  # tokens in the cache, steps that are profiled
_KINDS = (
    "base products",
    "attention",
    "norms, activations and the rest",
    "A",
    "B",
    "branch: scales and sums",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=int, default=4, help="how often models are loaded anew")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--layers", type=int, default=16, help="of the random Llama")
    parser.add_argument("--only", default="", help="measure ways whose names hold this")
    parser.add_argument("--keep", action="store_true", help="take exports that are there from an earlier run")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and stop")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/speed.md")
    given = parser.parse_args()
    folders, against = _folders(given.layers, given.keep, given.only)
    if given.prepare:
        return
    lines = []
    for model, ways in folders.items():
        load = partial(_workers, ways, given.threads)
        speeds = measure(load, given.tokens, given.rounds, given.loads)
        rows = [Row(name, folder_bytes(folder), against.get(name)) for name, folder in ways.items()]
        lines += [f"{model}:", "", *table(rows, speeds), ""]
    lines += [footnote(given.rounds, given.loads, given.threads), "", *_profiles(folders, given.threads)]
    say("\n".join(lines))
    if given.write:
        write_section("branch", lines)


def _workers(ways: Mapping[str, Path], threads: int) -> dict[str, Worker]:
    return {name: genai(folder, threads) for name, folder in ways.items()}


@dataclass(frozen=True)
class _Way:
    """A way to run a model. note: what is said of it beside mode and weights."""

    model: str
    base: Path
    adapter: Path
    mode: str
    weights: str
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.mode} {self.weights}{self.note}"


def _ways(layers: int) -> list[_Way]:
    """What there is to measure, merged before branch."""
    demo, llama = prepare(), cache_folder() / "bench-branch" / f"llama-{layers}"
    small = "SmolLM2-135M (hidden 576, 30 layers)"
    large = f"A random Llama (hidden 2048, {layers} layers)"
    base, vera, lora = _llama(llama, layers)
    cases = [
        (small, demo.base, demo.adapter, "int4", ""),
        (small, demo.base, demo.adapter, "int8", ""),
        (large, base, vera, "int8", ""),
        (large, base, lora, "int4", f", LoRA of rank {LORA_RANK}"),
    ]
    return [_Way(*case[:3], mode, *case[3:]) for case in cases for mode in ("merged", "branch")]


def _folders(layers: int, keep: bool, only: str) -> tuple[dict[str, dict[str, Path]], dict[str, str]]:
    """The exports by model and name, and which name a ratio is taken to."""
    folders: dict[str, dict[str, Path]] = {}
    against = {}
    for way in _ways(layers):
        if only not in way.name:
            continue
        words = way.name.replace(",", "").replace(" ", "-").lower()
        folder = cache_folder() / "bench-branch" / f"{way.base.parent.name}-{words}"
        folders.setdefault(way.model, {})[way.name] = folder
        if way.mode == "branch":
            against[way.name] = f"merged {way.weights}{way.note}"
        if keep and (folder / "genai_config.json").is_file():
            continue
        say(f"{way.model}, {way.name}: exporting")
        one = [(way.adapter, 1.0)]
        # How weights are rounded changes no product's time, and random ones are worth no calibration.
        rounding = Rounding() if way.base == prepare().base else Rounding("rtn")
        target.export(
            way.base, one, folder, mode=way.mode, weights=way.weights, force=True, rounding=rounding
        )
    return folders, against


def _llama(out: Path, layers: int) -> tuple[Path, Path, Path]:
    """A Llama with random weights, and a VeRA and a LoRA adapter on its seven linears."""
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import peft_adapters, tiny

    base, vera, lora = out / "base", out / "adapter", out / "lora"
    if not (base / "config.json").is_file():
        torch.manual_seed(0)
        tiny.save(LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=layers)), base)
    if not (vera / "adapter_config.json").is_file():
        tiny.make_adapter(base, vera, rank=256)
    if not (lora / "adapter_config.json").is_file():
        settings = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_adapters.save(base, lora, settings, strength=0.01)
    return base, vera, lora


def _profiles(folders: Mapping[str, Mapping[str, Path]], threads: int) -> Iterator[str]:
    yield "Where a step's time goes, in per cent of all nodes' time (nodes):"
    yield ""
    yield f"| model | {' | '.join(_KINDS)} |"
    yield "|---|" + "--:|" * len(_KINDS)
    for model, ways in folders.items():
        for name, folder in ways.items():
            if name.startswith("branch"):
                spent, nodes = _profile(folder, threads)
                whole = sum(spent.values())
                cells = [f"{100 * spent[kind] / whole:.0f} ({nodes[kind]})" for kind in _KINDS]
                yield f"| {model.split(' (')[0]}, {name} | {' | '.join(cells)} |"


def _profile(folder: Path, threads: int) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and nodes by kind, over STEPS decoding steps with the adapter active."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as temporary:
        options.profile_file_prefix = str(Path(temporary) / "profile")
        session = ort.InferenceSession(str(folder / "onnx" / "model.onnx"), options)
        adapter, run = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(folder / "adapters" / "default.onnx_adapter"))
        run.add_active_adapter(adapter)
        for _ in range(STEPS):
            session.run(["logits"], _step(session), run)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    nodes: dict[str, str] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"]] = kind = _kind(event["name"], event["args"]["op_name"])
            spent[kind] += event["dur"]
    return spent, Counter(nodes.values())


def _kind(node: str, op: str) -> str:
    if "/vera/" in node or "/lora/" in node:
        for matrix in ("A", "B"):
            if f"/{matrix}/" in node:
                return matrix
        return _KINDS[5]
    if "MatMul" in op:
        return _KINDS[0]
    if node.startswith("vera."):
        return _KINDS[5]
    return _KINDS[1] if "Attention" in op else _KINDS[2]


def _step(session: Any) -> dict[str, Any]:
    """One token after PAST in the cache."""
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = np.array([[500]], np.int64)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, PAST + 1), np.int64)
        elif value.name.startswith("past"):
            shape = (1, value.shape[1], PAST, value.shape[3])
            feeds[value.name] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return feeds


if __name__ == "__main__":
    main()
