"""Continue a prompt greedily with vera_edge's device part: FOLDER PROMPT COUNT -> one line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vera_edge
from vera_edge.device.session import Session


def main(folder: str, prompt: str, count: str) -> None:
    session = Session.open(Path(folder), adapter=None)
    text = "".join(session.generate(prompt, max_tokens=int(count), raw=True))
    print(json.dumps({"consumer": f"vera-edge {vera_edge.__version__}", "text": prompt + text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
