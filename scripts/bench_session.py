"""A folder in vera_edge.device, as a worker of the speed benches: see bench_turns.Worker.

python -m scripts.bench_session FOLDER --threads N   one line in: tokens; one line out: two speeds
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from scripts.bench_turns import LONG
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--four-bit", choices=("expanded", "int8", "kept"))
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--huge-pages", action="store_true")
    given = parser.parse_args()
    session = Session.open(
        given.folder,
        threads=given.threads,
        deep=False,
        four_bit=given.four_bit,
        resident=given.resident,
        huge_pages=given.huge_pages,
    )
    if given.huge_pages and not session.graph.moved:
        raise SystemExit("no weights could be moved to pages of 2 MB here")
    print("ready", flush=True)
    for line in sys.stdin:
        print(_decode(session, int(line)), flush=True)


def _decode(session: Session, tokens: int) -> str:
    steps = Steps(session.decoder, session.decoder.cache(LONG + tokens), session.vectors)
    begun = time.perf_counter()
    one = np.array([[int(steps.prefill(np.arange(100, 100 + LONG)).argmax())]])
    started = time.perf_counter()
    for _ in range(tokens):
        one[0, 0] = int(steps.feed(one)[0, 0].argmax())
    return f"{LONG / (started - begun)} {tokens / (time.perf_counter() - started)}"


if __name__ == "__main__":
    main()
