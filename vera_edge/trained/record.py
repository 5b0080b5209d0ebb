"""What an adapter's folder tells of how its base was loaded in training, and what is assumed else.

PEFT records neither quantization nor dtype. Some trainers write BitsAndBytesConfig's keys into README.md, and
PEFT itself once did. It is told to a person, not acted on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs, quantized_as
from vera_edge.base.trained_as.spec import DTYPES, FOUR_BIT, STORAGES

CARD = "README.md"
ASSUMED = (
    "assuming the adapter was trained on the float weights as they lie here; if the base was quantized when "
    "it was loaded, say so with --trained-as nf4 (fp4 when load_in_4bit=True was given alone, int8 when "
    "load_in_8bit=True was), or if it wasn't, with --trained-as float"
)
# BitsAndBytesConfig's keys, in YAML, in Python or in the list that PEFT wrote: "- load_in_4bit: True".
_LINE = re.compile(
    r"""^[\s>*-]*["']?(?P<key>load_in_[48]bit|bnb_4bit_\w+)["']?\s*[:=]\s*["'`]?(?P<value>[\w.]+)""",
    re.MULTILINE,
)
_MOST = 1 << 20  # bytes of a model card that are read
_FIELDS = {"bnb_4bit_compute_dtype": "compute_dtype", "bnb_4bit_quant_storage": "storage"}


def told(adapter: Adapter) -> dict[str, Any] | None:
    """The fields of `TrainedAs` that the adapter's model card tells, None when it tells of no quantization.

    "format" is missing when it says 4 bits, but not which.
    """
    try:
        with (adapter.path / CARD).open("rb") as stream:
            text = stream.read(_MOST).decode("utf-8", "replace")
    except OSError:
        return None
    said = {found["key"]: found["value"].removeprefix("torch.") for found in _LINE.finditer(text)}
    if _true(said, "load_in_8bit"):
        return {"format": "int8"}
    if not _true(said, "load_in_4bit"):
        return None
    fields: dict[str, Any] = {}
    if (kind := said.get("bnb_4bit_quant_type")) in FOUR_BIT:
        fields["format"] = kind
    if "bnb_4bit_use_double_quant" in said:
        fields["double_quant"] = _true(said, "bnb_4bit_use_double_quant")
    for key, name in _FIELDS.items():
        if said.get(key) in (STORAGES if name == "storage" else DTYPES):
            fields[name] = said[key]
    return fields


def _true(said: Mapping[str, str], key: str) -> bool:
    return said.get(key, "").lower() == "true"


def notes(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Sentences on how the base was loaded in training: what is assumed, or what speaks against it."""
    base = checkpoint.trained_as or quantized_as(checkpoint.config, checkpoint.linears)
    said = told(adapter)
    if said is None:
        return (ASSUMED,) if base is None else ()
    kinds = {said["format"]} if "format" in said else set(FOUR_BIT)
    agrees = all(getattr(base, name, None) == value for name, value in said.items())
    return () if agrees and getattr(base, "format", None) in kinds else (_against(said, base),)


def _against(said: Mapping[str, Any], base: TrainedAs | str | None) -> str:
    here = "the base here is in floats" if base is None else f"the base here is {base}"
    if "format" not in said:
        return (
            f"{CARD} in the adapter's folder says that its base was loaded in 4 bits, and {here}: give "
            "--trained-as nf4 or fp4 if that is so, or --trained-as float if it isn't"
        )
    words = TrainedAs(**said)
    return (
        f"{CARD} in the adapter's folder says that its base was loaded as {words}, and {here}: give the "
        f"float base with --trained-as {words} if that is so, or --trained-as float if it wasn't quantized"
    )
