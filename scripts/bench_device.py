"""The device part against ONNX Runtime GenAI on the same bundle: prefill, decode, start, swap, memory.

    python scripts/bench_device.py BUNDLE [--rounds 7] [--prompt 128] [--new 64] [--threads N] [--json]

Both run the bundle's default adapter in processes of their own, in turn, round by round, so that a machine
whose speed wanders slows both alike; the ratio is that of medians, with a 95 % bootstrap interval over
rounds. A start is everything from the launch of the process, for the device part the check of every byte too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.bundle import contents as bundle
from vera_edge.device.check.bench import ratio_of_medians

FIGURES = ("prefill", "decode")


def run_ours(folder: Path, prompt: int, new: int, threads: int | None, launched: float) -> dict[str, Any]:
    """One round of the device part: seconds to start, tokens per second, swap in ms, peak memory in MB.

    launched: when this process was, seconds since the epoch.
    """
    from vera_edge.device.runtime.decoding import Steps
    from vera_edge.device.runtime.session import Session
    from vera_edge.memory import peak_rss

    session = Session.open(folder, threads=threads, reread=True)
    start = time.time() - launched
    tokens = np.random.default_rng(0).integers(10, session.vocab_size, prompt)
    for _ in range(2):  # the first pass warms the caches
        steps = Steps(session.decoder, session.decoder.cache(prompt + new), session.vectors)
        began = time.perf_counter()
        token = int(steps.prefill(tokens).argmax())
        prefill = time.perf_counter() - began
        one = np.empty((1, 1), np.int64)
        began = time.perf_counter()
        for _ in range(new - 1):
            one[0, 0] = token
            token = int(steps.feed(one)[0, 0].argmax())
        decode = time.perf_counter() - began
    result: dict[str, Any] = {"start": start, "prefill": prompt / prefill, "decode": (new - 1) / decode}
    if session.manifest.mode == "branch":
        times = []
        for choice in (None, "default") * 5:
            began = time.perf_counter()
            session.swap(choice)
            times.append(time.perf_counter() - began)
        result["swap_ms"] = 1e3 * float(np.median(times[1::2]))
    return result | {"peak_mb": (peak_rss() or 0) / 1e6}


def run_theirs(folder: Path, prompt: int, new: int, threads: int | None, launched: float) -> dict[str, Any]:
    """The same with ONNX Runtime GenAI's generator, greedy, with the bundle's default adapter."""
    import onnxruntime_genai as og

    from vera_edge.memory import peak_rss

    manifest = bundle.read(folder)
    name = manifest.default_adapter if manifest.mode == "branch" else None
    adapter = None if name is None else manifest.path(manifest.adapters[name]["file"])
    config = og.Config(str(folder))
    if threads:
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
        )
    model = og.Model(config)
    adapters = og.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "default")
    start = time.time() - launched
    vocab = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    tokens = np.random.default_rng(0).integers(10, vocab, prompt).astype(np.int32)
    for _ in range(2):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=prompt + new, min_length=prompt + new, do_sample=False)
        generator = og.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(adapters, "default")
        began = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        decode = time.perf_counter() - began
        del generator
    peak = (peak_rss() or 0) / 1e6
    return {"start": start, "prefill": prompt / prefill, "decode": (new - 1) / decode, "peak_mb": peak}


def main() -> None:
    """Run the rounds and print a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run = run_ours if options.one == "ours" else run_theirs
        result = run(options.bundle, options.prompt, options.new, options.threads, options.launched)
        print(json.dumps(result))
        return
    bundle.verify(options.bundle, complete=True)  # GenAI draws no projections from a seed
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(options.rounds):
        for who, found in rounds.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", who, "--launched"]
            command.append(str(time.time()))
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        who: {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
        for who, rows in rounds.items()
    }
    ratios = {
        key: ratio_of_medians([row[key] for row in rounds["ours"]], [row[key] for row in rounds["theirs"]])
        for key in FIGURES
    }
    if options.json:
        print(json.dumps({"median": medians, "ratio": ratios, "rounds": rounds}, indent=2))
        return
    print(f"{'':24}{'vera_edge.device':>18}{'ONNX Runtime GenAI':>20}   ratio (95 %)")
    for key, words in (("prefill", "prefill, tokens/s"), ("decode", "decode, tokens/s")):
        ratio, low, high = ratios[key]
        ours, theirs = medians["ours"][key], medians["theirs"][key]
        print(f"{words:24}{ours:18.1f}{theirs:20.1f}   {ratio:.3f} ({low:.3f} to {high:.3f})")
    for key, words in (("start", "start, s"), ("peak_mb", "peak memory, MB")):
        print(f"{words:24}{medians['ours'][key]:18.2f}{medians['theirs'][key]:20.2f}")
    if "swap_ms" in medians["ours"]:
        print(f"{'adapter swap, ms':24}{medians['ours']['swap_ms']:18.2f}")


if __name__ == "__main__":
    main()
