"""What a recipe's tables have in common, and what ids and lines of text may be: folders, XML, model cards."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a release writes beside its adapters' folders, and what Windows keeps for its devices.
_TAKEN = {"rejected", "release.json", "summary.md", "junit.xml"}
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def identifier(value: str) -> str:
    """`value`, when it can be the name of a folder; raises ValueError else."""
    # Ids become folder names, on every kind of file system.
    if not _ID.fullmatch(value) or value.endswith("."):
        raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', and start with a letter or digit")
    if value.lower() in _TAKEN or _DEVICE.fullmatch(value):
        raise ValueError(f"can't be {value!r}, which is the name of something else; choose another")
    return value


def _line(value: str) -> str:
    # Cards, XML and file names: none of them takes control characters.
    if not value.isprintable() or not value.strip():
        raise ValueError("must be one line of text")
    return value


Id = Annotated[str, AfterValidator(identifier)]
Line = Annotated[str, AfterValidator(_line)]


class RecipeTable(BaseModel):
    """A table of a recipe: no key that isn't known, no value of another kind than the key's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
