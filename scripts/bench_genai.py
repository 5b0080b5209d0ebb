"""A folder in ONNX Runtime GenAI, as a worker of the speed benches: see bench_turns.Worker.

python -m scripts.bench_genai FOLDER --threads N   one line in: tokens; one line out: two speeds
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from scripts.bench_turns import LONG


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    config = og.Config(str(given.folder))
    settings = {"model": {"decoder": {"session_options": {"intra_op_num_threads": given.threads}}}}
    config.overlay(json.dumps(settings))
    model = og.Model(config)
    adapters, file = og.Adapters(model), given.folder / "adapters" / "default.onnx_adapter"
    if file.is_file():
        adapters.load(str(file), "default")
    print("ready", flush=True)
    for line in sys.stdin:
        print(_decode(model, adapters if file.is_file() else None, int(line)), flush=True)


def _decode(model: og.Model, adapters: og.Adapters | None, tokens: int) -> str:
    params, length = og.GeneratorParams(model), LONG + tokens + 1
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    if adapters is not None:
        generator.set_active_adapter(adapters, "default")
    begun = time.perf_counter()
    generator.append_tokens(np.arange(100, 100 + LONG, dtype=np.int32)[None])
    generator.generate_next_token()
    started = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    return f"{LONG / (started - begun)} {tokens / (time.perf_counter() - started)}"


if __name__ == "__main__":
    main()
