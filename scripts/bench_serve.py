"""Measure tokens per second of 1, 4 and 8 streams of one server, of the same adapter and of different ones.

    scripts/bench_serve [BUNDLE] [--rounds 3] [--tokens 64] [--threads N] [--write]

BUNDLE is an export with a side-branch; by default one of the demo's model in int8 is made. The clients are
threads of this process, which read streams over HTTP. All ways take turns, a round each, so that what else
the machine does falls on all alike. CPU time is the server's own, by /proc. `--write` puts the table into
docs/speed.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.bench_adapters import write_adapters
from scripts.bench_turns import PROMPT, say, write_section
from scripts.prepare_demo import cache_folder, prepare
from tests.served import Served, served
from vera_edge.cores import available_cores
from vera_edge.device.check.hardware import processor
from vera_edge.exporting import target

_STREAMS = 8


@dataclass
class Way:
    """A way to ask: `streams` at once, of `adapters` different adapters, of one of two servers."""

    name: str
    streams: int
    adapters: int
    varying: bool = False
    speeds: list[float] = field(default_factory=list)  # tokens per second of all streams together
    costs: list[float] = field(default_factory=list)  # CPU milliseconds of the server per token


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--write", action="store_true", help="write the table into docs/speed.md")
    given = parser.parse_args()
    folder = given.bundle or _bundle()
    ways = [
        Way("one after the other", 1, _STREAMS),
        Way("one after the other, `--varying`", 1, _STREAMS, varying=True),
        *(Way(f"{count} at once, one adapter", count, 1) for count in (4, 8)),
        *(Way(f"{count} at once, {count} adapters", count, count) for count in (4, 8)),
    ]
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache_folder())))
        write_adapters(folder, files, _STREAMS)
        words = ("--rows", _STREAMS, "--adapters-from", files, "--fast", "--threads", given.threads)
        servers = [stack.enter_context(served(folder, *words, *more)) for more in ((), ("--varying",))]
        for server in servers:
            for path in sorted(files.iterdir()):
                body = {"name": f"a{path.stem}", "path": path.name}
                assert server.ask("POST", "/v1/adapters", body)[0] == 201
        for number in range(given.rounds + 1):
            for way in ways:
                speed, cost = _round(servers[way.varying], way, given.tokens)
                if number:  # the first warms up
                    way.speeds.append(speed)
                    way.costs.append(cost)
                    say(f"{way.name}: {speed:.1f} tokens/s, {cost:.2f} ms of CPU per token")
    lines = _table(ways, given.rounds, given.threads)
    say("\n".join(lines))
    if given.write:
        write_section("serve", lines)


def _bundle() -> Path:
    folder, demo = cache_folder() / "bench-serve", prepare()
    target.export(demo.base, [(demo.adapter, 1.0)], folder, mode="branch", weights="int8", force=True)
    return folder


def _round(server: Served, way: Way, tokens: int) -> tuple[float, float]:
    """Tokens per second, and milliseconds of CPU for each, of _STREAMS answers."""
    asked = [(f"a{number % way.adapters:04}", number) for number in range(_STREAMS)]
    before, started = _cpu(server), time.perf_counter()
    with ThreadPoolExecutor(way.streams) as pool:
        counts = list(pool.map(lambda pair: _stream(server, pair[0], pair[1], tokens), asked))
    seconds = time.perf_counter() - started
    return sum(counts) / seconds, 1e3 * (_cpu(server) - before) / sum(counts)


def _stream(server: Served, model: str, number: int, tokens: int) -> int:
    """Read one answer to its end; its tokens."""
    prompt = np.random.default_rng(number).integers(100, 1000, PROMPT).tolist()
    options = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, **options})
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    events = [line[6:] for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    count: int = json.loads(events[-1])["usage"]["completion_tokens"]
    return count


def _cpu(server: Served) -> float:
    """Seconds of CPU that the server's process has used."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _table(ways: Sequence[Way], rounds: int, threads: int) -> list[str]:
    lines = [
        "| eight answers | tokens/s, median | ratio | CPU ms per token | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    speed, cost = (statistics.median(values) for values in (ways[0].speeds, ways[0].costs))
    for way in ways:
        own, spent = statistics.median(way.speeds), statistics.median(way.costs)
        lines.append(
            f"| {way.name} | {own:.1f} | **{own / speed:.2f}** | {spent:.1f} | **{spent / cost:.2f}** |"
        )
    return [
        *lines,
        "",
        f"SmolLM2-135M, branch int8, {PROMPT} tokens of prompt each; medians of {rounds} rounds in turns, "
        f"{threads} threads on {available_cores()} cores of {processor()[0]}, clients on the same cores.",
    ]


if __name__ == "__main__":
    main()
