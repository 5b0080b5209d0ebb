#!/usr/bin/env python
"""Writes docs/config-fields.md: the settings of decoders that tests/unit/exporters/test_parity.py draws."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "config-fields.md"
HEAD = """\
# Settings of a decoder's config

The fields of `config.json` that change what a decoder computes, by architecture. *Carried*: the exported
graph gives transformers' logits within 1e-3 of their scale, on sequences past the window and past the rotary
embedding's original length, at once and in pieces with the cache. *Refused*: `vera-edge export` says so in
one sentence that names the first layer that differs, and writes nothing. *(empty)*: not a setting of that
architecture, or not tried.

The same comparison is made at every export, with the model at hand (docs/export.md), so a setting that isn't
in this table is found too. It is written by `scripts/make_config_table.py` from the cases of
`tests/unit/exporters/test_parity.py`, each on a tiny random model.

"""
TAIL = """
An architecture that isn't here is refused unless ONNX Runtime GenAI's model builder draws it, and then held
against the model like these.
"""


def table() -> str:
    """The whole page."""
    from tests.config_fields import CASES

    outcomes = {(case.architecture, case.setting): case.outcome for case in CASES}
    settings = list(dict.fromkeys(case.setting for case in CASES))
    rows = []
    for name in dict.fromkeys(case.architecture for case in CASES):
        cells = [outcomes.get((name, setting), "") for setting in settings]
        rows.append(f"| {name.removesuffix('ForCausalLM')} | {' | '.join(cells)} |")
    lines = [f"| architecture | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|", *rows]
    return HEAD + "\n".join(lines) + "\n" + TAIL


def main() -> None:
    TABLE.write_text(table())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
