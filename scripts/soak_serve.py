"""Ask a server for long from many clients at once, and watch what it holds: memory, files, threads.

    python -m scripts.soak_serve [BUNDLE] [--requests 8000] [--clients 8] [--minutes 10] [--tokens 24]
        [--patience 600] [--most 0.02]

BUNDLE is any export; by default a two-layer model with two adapters is made, so that requests are many. The
clients are OpenAI's own, threads of this process. They take turns with all models, chats and completions,
streams and whole answers, and leave some streams halfway; every twentieth request is one that must be
refused. Ends by itself, and with exit 1 when the memory of the last quarter is more than the second's by the
share `--most`, when files or threads are left open, or when an answer isn't what was asked for. Linux only
(/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from tests import tiny, tiny_bundle
from tests.served import Served, served

SAMPLES = 80  # of what the server holds, over all requests
REFUSED = 20  # every so many-th request is one that is refused


@dataclass(frozen=True)
class Sample:
    """What the server's process holds after so many requests; memory in bytes."""

    requests: int
    memory: int
    files: int
    threads: int


@dataclass
class Soak:
    """What the clients share."""

    server: Served
    models: Sequence[str]
    requests: int
    until: float
    tokens: int
    patience: float
    done: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: int = 0

    def next(self) -> int | None:
        """The number of the next request, or None when there is none; takes a sample now and then."""
        with self.lock:
            if self.begun >= self.requests or time.monotonic() > self.until:
                return None
            if self.begun % max(1, self.requests // SAMPLES) == 0:
                self.samples.append(held(self.server, self.begun))
            self.begun += 1
            return self.begun - 1

    def client(self) -> None:
        client = self.server.client(timeout=self.patience)
        while (number := self.next()) is not None:
            kind = self.ask(client, number)
            with self.lock:
                self.done[kind] += 1

    def ask(self, client: Any, number: int) -> str:
        """Do one request; what kind it was, or what was wrong with its answer."""
        if number % REFUSED == REFUSED - 1:
            return _refused(client, number)
        options = {
            "model": self.models[number % len(self.models)],
            "max_tokens": 1 + number % self.tokens,
            "temperature": number % 2,
            "seed": number,
        }
        # Few words: the tokenizer keeps how 10,000 were split, which looks like growth until it has them.
        text = f"Request {number % 97}: " + "the adapter scales each row " * (number % 5)
        chat = number % 3 == 0
        create = client.chat.completions.create if chat else client.completions.create
        said: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        if number % 4:
            answer = create(**options, **said)
            known = (
                answer.usage.completion_tokens <= options["max_tokens"] and answer.choices[0].finish_reason
            )
            return ("chat" if chat else "completion") if known else "wrong: more tokens than asked for"
        stream = create(**options, **said, stream=True)
        if number % 8 == 0:
            next(iter(stream), None)
            stream.close()
            return "stream left halfway"
        ends = [event.choices[0].finish_reason for event in stream if event.choices]
        return "stream" if ends and ends[-1] else "wrong: a stream without an end"


def _refused(client: Any, number: int) -> str:
    """A model that isn't there, or a number of tokens that can't be."""
    wrong = {"model": "nobody"} if number % 2 else {"max_tokens": -1}
    try:
        client.completions.create(**{"model": "base", "prompt": "x", **wrong})
    except (openai.NotFoundError, openai.BadRequestError):
        return "refused"
    return "wrong: an answer to a request that can't be answered"


def held(server: Served, requests: int) -> Sample:
    """What the server's process holds now."""
    process = Path(f"/proc/{server.process.pid}")
    files, threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
    return Sample(requests, server.memory(), files, threads)


def growth(memory: Sequence[int]) -> float:
    """How much more the last quarter of the samples is than the second, by their medians; 0.01 is 1 %."""
    quarter = max(1, len(memory) // 4)
    before, after = memory[quarter : 2 * quarter] or memory, memory[-quarter:]
    return statistics.median(after) / statistics.median(before) - 1


def soak(bundle: Path, given: argparse.Namespace) -> int:
    """Serve and ask; the exit code."""
    with served(bundle, "--rows", given.clients, "--timeout", given.patience) as server:
        models = [model.id for model in server.client().models.list()]
        started = time.monotonic()
        until = started + 60 * given.minutes
        job = Soak(server, models, given.requests, until, given.tokens, given.patience)
        clients = [threading.Thread(target=job.client) for _ in range(given.clients)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        seconds = time.monotonic() - started
        while (
            busy := server.ask("GET", "/health")[1]["requests"]
        ) and time.monotonic() - started < seconds + 60:
            time.sleep(0.2)
        job.samples.append(held(server, job.begun))
        return report(job, seconds, busy, given.most)


def report(job: Soak, seconds: float, busy: int, most: float) -> int:
    """Print what was done and held; the exit code."""
    for sample in job.samples[:: max(1, len(job.samples) // 10)]:
        memory = f"{sample.memory / 1e6:.1f} MB"
        print(f"after {sample.requests} requests: {memory}, {sample.files} files, {sample.threads} threads")
    print(f"{sum(job.done.values())} requests in {seconds:.0f} s: {dict(job.done.most_common())}")
    grown, last = growth([sample.memory for sample in job.samples]), job.samples[-1]
    print(f"memory of the last quarter over the second: {100 * grown:+.2f} %")
    early = job.samples[len(job.samples) // 4]
    wrong = [kind for kind in job.done if kind.startswith("wrong")]
    wrong += [f"{busy} requests still run"] if busy else []
    wrong += [f"memory grows by more than {100 * most:g} %"] if grown > most else []
    wrong += ["files are left open"] if last.files > early.files + len(job.models) else []
    wrong += ["threads are left"] if last.threads > early.threads else []
    if sum(job.done.values()) < job.begun:
        wrong.append("a client ended by an error, which stands above")
    print("; ".join(wrong) or "no growth")
    return 1 if wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10, help="the most that it may take")
    parser.add_argument("--tokens", type=int, default=24, help="the longest answer")
    parser.add_argument("--patience", type=float, default=600, help="seconds that an answer may take")
    parser.add_argument("--most", type=float, default=0.02, help="the growth of memory that is let pass")
    given = parser.parse_args()
    logging.disable(logging.INFO)  # each client's every request
    with tempfile.TemporaryDirectory(prefix="soak-serve-") as folder:
        sys.exit(soak(given.bundle or _made(Path(folder)), given))


def _made(folder: Path) -> Path:
    """A two-layer model whose rows may run different adapters; its builder's talk is kept back."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        base = tiny.TinyLlama(folder / "base").fp32
        return tiny_bundle.TinyBundles(base, folder / "bundles").rows


if __name__ == "__main__":
    main()
