"""Makes the tokenizer's settings readable where transformers is older than 5 (Optimum pins such a one), or is
Transformers.js.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.device.runtime import template
from vera_edge.errors import TargetError
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import read_json, settings_json

FILE = "tokenizer_config.json"
# transformers 5 names every tokenizer without a class of its own so; older ones have no class of that name.
_NEW, _OLD = "TokenizersBackend", "PreTrainedTokenizerFast"


def mend(folder: Path, inputs: Sequence[str]) -> None:
    """Name the tokenizer's class as every transformers does, say which inputs the graph takes, and put the
    chat templates beside them, which Transformers.js reads nowhere else.

    inputs: of the graph. A tokenizer without a class of its own would make token_type_ids too, which a
    decoder refuses. A folder without a tokenizer is left alone.
    """
    if not (folder / FILE).is_file():
        return
    facts = read_json(folder / FILE, TargetError)
    changed = dict(facts)
    if facts.get("tokenizer_class") in (None, _NEW, _OLD):
        known = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in inputs]
        changed |= {"tokenizer_class": _OLD, "model_input_names": known}
    templates = template.read(folder, facts)
    if templates.keys() == {template.DEFAULT}:
        changed["chat_template"] = templates[template.DEFAULT]
    elif templates:
        changed["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    if changed != facts:
        write_atomic(folder / FILE, settings_json(changed))
