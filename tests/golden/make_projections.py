"""Writes tests/golden/projections.json: the digests of projections drawn by PEFT and torch, by spec.

Run from the repository's root: python -m tests.golden.make_projections
The draws without fused multiply-add come from a second process with ATEN_CPU_CAPABILITY=default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vera_edge.adapters.projection import ROUNDINGS, Projections, ProjectionSpec

TARGET = Path(__file__).parent / "projections.json"
# (seed, rank, in_max, out_max): sizes of one, rank larger than a side, sides of SmolLM2 and of a 7B model,
# seeds past 32 bits and below zero.
DRAWS = (
    (0, 1, 1, 1),
    (1, 4, 7, 5),
    (2, 100, 16, 24),
    (20240117, 256, 576, 1536),
    (2**32 + 5, 8, 64, 48),
    (2**64 - 1, 8, 64, 48),
    (-1, 8, 64, 48),
    (-(2**63), 8, 64, 48),
    (11, 16, 4096, 11008),
)


def main() -> None:
    import peft
    import torch

    if sys.argv[1:] == ["--unfused"]:
        print(json.dumps([entry for draw in DRAWS for entry in entries(draw, fused=False)]))
        return
    command = [sys.executable, "-m", "tests.golden.make_projections", "--unfused"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    unfused = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = [entry for draw in DRAWS for entry in entries(draw, fused=True)]
    rows += json.loads(unfused.stdout.splitlines()[-1])
    tools = json.dumps({"peft": peft.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(row) for row in rows)
    TARGET.write_text(f'{{"tools": {tools}, "projections": [\n{lines}\n]}}\n')


def entries(draw: tuple[int, int, int, int], fused: bool) -> list[dict[str, Any]]:
    """The draw in each rounding, as rows of the golden file."""
    import torch
    from peft.tuners.vera.model import _kaiming_init

    seed, rank, in_max, out_max = draw
    generator = torch.Generator("cpu").manual_seed(seed)
    a = _kaiming_init((rank, in_max), generator=generator)
    b = _kaiming_init((out_max, rank), generator=generator)
    rows = []
    for rounding in ROUNDINGS:
        spec = ProjectionSpec(seed, rank, in_max, out_max, rounding, fused)
        rounded = [matrix.to(getattr(torch, rounding)).float().numpy() for matrix in (a, b)]
        rows.append({"spec": spec.to_dict(), "digest": Projections(spec, *rounded).digest})
    return rows


if __name__ == "__main__":
    main()
