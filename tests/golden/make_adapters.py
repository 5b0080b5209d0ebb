"""Writes tests/golden/adapters/peft-<version>/<case>: adapters as the installed PEFT saves them.

Run from the repository's root, once for each PEFT, installed in a folder of its own:

    pip install --no-deps --target /tmp/peft-0.19.1 peft==0.19.1
    PYTHONPATH=/tmp/peft-0.19.1 python -m tests.golden.make_adapters

PEFT 0.17 doesn't import with transformers 5; put transformers 4.57 (and its tokenizers and huggingface_hub)
into the folder too. `held.json` records the digest of the projections that PEFT held in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from tests import peft_cases, tiny
from vera_edge.adapters.projection import Projections, ProjectionSpec

ADAPTERS = Path(__file__).parent / "adapters"


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
    import bitsandbytes
    import peft
    import torch
    import transformers

    folder = ADAPTERS / f"peft-{peft.__version__}"
    shutil.rmtree(folder, ignore_errors=True)
    held = {}
    with tempfile.TemporaryDirectory() as temporary:
        llama = tiny.TinyLlama(Path(temporary))
        for name, case in peft_cases.CASES.items():
            try:
                a, b = peft_cases.make(case, llama, folder / name)
            except Exception as cause:
                shutil.rmtree(folder / name, ignore_errors=True)
                print(f"{peft.__version__} can't make {name}: {type(cause).__name__}: {cause}")
                continue
            (folder / name / "README.md").unlink(missing_ok=True)
            spec = ProjectionSpec(case.seed, a.shape[0], a.shape[1], b.shape[0])
            held[name] = Projections(spec, a, b).digest
    tools = {module.__name__: module.__version__ for module in (peft, torch, transformers, bitsandbytes)}
    record = json.dumps({"tools": tools, "held": held}, indent=2, sort_keys=True)
    (folder / "held.json").write_text(record + "\n")


if __name__ == "__main__":
    main()
