"""Continue a prompt greedily with vera_edge's device part: FOLDER PROMPT COUNT [ADAPTER], gives JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vera_edge
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session


def main(folder: str, prompt: str, count: str, adapter: str | None = None) -> None:
    merged = bundle.read(Path(folder)).mode == "merged"
    session = Session.open(folder, adapter="default" if merged else None)
    if adapter:
        session.swap(Path(adapter))
    text = "".join(session.generate(prompt, max_tokens=int(count), raw=True))
    print(json.dumps({"consumer": f"vera-edge {vera_edge.__version__}", "text": prompt + text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
