"""One round of a benchmark, in a process of its own: `python -m vera_edge.device.check.bench_round` and JSON.

A process of its own starts cold as a program does, and its peak memory is that of one bundle.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vera_edge.errors import DataError, VeraEdgeError


def measure(
    folder: Path,
    prompt: int,
    new: int,
    threads: int | None,
    resident: bool = False,
    huge_pages: bool = False,
) -> dict[str, Any]:
    """Open the bundle and generate `new` tokens after `prompt` seeded ones, twice; the second time counts.

    resident, huge_pages: of `Session.open`.

    Returns load (s, imports included), first_token (s, of the first time), prefill and decode (tokens/s),
    steps (ms, each decoded token), peak_rss (bytes or None), energy (J per decoded token, or None).
    """
    began = time.perf_counter()
    import numpy as np

    from vera_edge.device.check.energy import EnergyMeter
    from vera_edge.device.runtime.decoding import Steps
    from vera_edge.device.runtime.session import Session
    from vera_edge.memory import peak_rss

    session = Session.open(folder, threads=threads, resident=resident, huge_pages=huge_pages)
    result: dict[str, Any] = {"load": time.perf_counter() - began, "threads": session.graph.threads}
    if prompt + new > session.decoder.context:
        raise DataError(
            f"{prompt} tokens and {new} more don't fit the context of {session.decoder.context} "
            f"that {folder} has; give smaller --prompt and --new"
        )
    tokens = np.random.default_rng(0).integers(0, session.vocab_size, prompt)
    one = np.empty((1, 1), np.int64)
    for _ in range(2):
        steps = Steps(session.decoder, session.decoder.cache(prompt + new), session.vectors)
        began = time.perf_counter()
        one[0, 0] = int(steps.prefill(tokens).argmax())
        prefill = time.perf_counter() - began
        result.setdefault("first_token", prefill)
        times, meter = [time.perf_counter()], EnergyMeter()
        for _ in range(new - 1):
            one[0, 0] = int(steps.feed(one)[0, 0].argmax())
            times.append(time.perf_counter())
        joules = meter.joules()
    return result | {
        "prefill": prompt / prefill,
        "decode": (new - 1) / (times[-1] - times[0]),
        "steps": [1e3 * float(step) for step in np.diff(times)],
        "peak_rss": peak_rss(),
        "energy": None if joules is None else joules / (new - 1),
    }


def main(words: list[str]) -> int:
    """FOLDER PROMPT NEW THREADS [resident] [huge_pages], 0 threads for all cores.

    One JSON object on stdout, or {"error": ...}.
    """
    folder, prompt, new, threads = Path(words[0]), int(words[1]), int(words[2]), int(words[3])
    try:
        how = {word: word in words[4:] for word in ("resident", "huge_pages")}
        result = measure(folder, prompt, new, threads or None, **how)
    except VeraEdgeError as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
