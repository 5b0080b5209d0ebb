#!/usr/bin/env python
"""Writes docs/families.md: the model families that tests/unit/trained/test_families.py merges on."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "families.md"
HEAD = """\
# Model families

Each family below is tested with a tiny random model, made in code: PEFT puts a VeRA adapter on the layers
named, vera-edge reads both, merges to float32, and the merged model's outputs equal those of PEFT's unmerged
model within 1e-4 of the largest output (`tests/unit/trained/test_families.py`). This table is written by
`scripts/make_families_table.py`.

| family | class in transformers | layers adapted | what is unlike a plain stack of linears |
|---|---|---|---|
"""
TAIL = """
Other families work when their linears are `nn.Linear` or `Conv1D`. A layer is found by its name:

* The names PEFT and the checkpoint use may differ by a prefix (`h.0` in the checkpoint, `transformer.h.0` in
  the model), by the order of two parts (`language_model.model.layers`, `model.language_model.layers`), or by
  what transformers renames on loading; the last needs transformers installed. A merge keeps the checkpoint's
  names.
* What held the model when the adapter was saved isn't part of a name: `_orig_mod` (torch.compile), `module`
  (data parallel), `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, an adapter's name at the end
  (`vera_lambda_b.default`). A note says what was left out; other wrappers are refused.
* Each stack of layers must be found in one place, and just one must fit; else the layer is reported as
  missing.
* Experts that transformers 5 fuses into one tensor aren't linears to PEFT's VeRA, so no adapter is on them.
"""


def table() -> str:
    """The whole page."""
    from tests.families import FAMILIES

    rows = []
    for name, family in FAMILIES.items():
        targets = ", ".join(f"`{target}`" for target in family.targets)
        rows.append(f"| {name} | `{family.model}` | {targets} | {family.peculiar} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def main() -> None:
    TABLE.write_text(table())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
