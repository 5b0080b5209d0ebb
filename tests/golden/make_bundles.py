"""Make tests/golden/bundles: bundles as version 0.1.0 exported them, which every later version opens.

    python tests/golden/make_bundles.py        in a checkout of that version (commit 32c62b2), not of this one

They are the tiny Llama of tests/tiny.py in NF4 with its adapter as a branch: once with projections in the
files, and once drawn from the seed, 4-bit weights expanded to int8 on the device. Both have golden vectors.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent / "bundles"
PROMPTS = ["The adapter", "A weight of the base"]
LIMITS = {"max_kl": 0.01}
OPTIONS = {"branch": {}, "seed": {"origin": "seed", "run": "int8"}}


def main() -> None:
    # Modules of that version, not of this one.
    from vera_edge.target import export  # type: ignore[import-not-found]

    from tests import tiny
    from vera_edge import golden_vectors  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as scratch:
        llama = tiny.TinyLlama(Path(scratch) / "llama")
        adapter = tiny.make_adapter(llama.nf4, Path(scratch) / "adapter")
        for name, options in OPTIONS.items():
            out = OUT / name
            export(llama.nf4, [(adapter, 1.0)], out, mode="branch", weights="nf4", options=options)
            golden_vectors.ask(out, llama.nf4, [(adapter, 1.0)], LIMITS, PROMPTS)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
