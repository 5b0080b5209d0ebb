"""Reads an adapter of any method that is known, found by its `peft_type`.

A method that another package brings is an entry point of the group `vera_edge.adapter_methods`, whose name is
the `peft_type` and whose value is a `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType

from vera_edge.adapters import lora, peft_methods, vera
from vera_edge.adapters.adapter import LORA, Adapter
from vera_edge.adapters.folder import CONFIG_NAME, open_folder, read_config
from vera_edge.adapters.method import Method
from vera_edge.errors import AdapterError

__all__ = ["CONFIG_NAME", "GROUP", "METHODS", "can_branch", "described", "method_of", "read", "title_of"]

GROUP = "vera_edge.adapter_methods"
METHODS: Mapping[str, Method] = MappingProxyType(
    {method.peft_type: method for method in (vera.METHOD, lora.METHOD, *peft_methods.METHODS)}
)
# What these train is tokens before the text or keys and values, not weights.
_PROMPTS = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"),
        *("CPT", "CARTRIDGE"),
    }
)


def read(path: Path) -> Adapter:
    """Read the adapter in folder `path`.

    Raises AdapterError when it can't be read, is of a method that isn't known, contradicts itself, or holds
    NaN or infinities.
    """
    config = read_config(path)
    method = method_of(config.get("peft_type"), path)
    return method.read(open_folder(path, config, method.own))


def method_of(peft_type: object, path: Path) -> Method:
    """The method of that name. Raises AdapterError, of the folder `path`, when it isn't known."""
    if isinstance(peft_type, str) and (known := METHODS.get(peft_type) or _brought().get(peft_type)):
        return known
    if isinstance(peft_type, str) and peft_type in _PROMPTS:
        raise AdapterError(
            f"{path} holds a PEFT adapter of type {peft_type}, which trains a prompt and no weight; there is "
            "nothing to merge or to put beside a layer"
        )
    raise AdapterError(
        f"{path} holds a PEFT adapter of type {peft_type}, which vera-edge doesn't know; it takes "
        f"{', '.join(sorted(METHODS.keys() | _brought().keys()))}"
    )


def can_branch(adapter: Adapter) -> bool:
    """Whether it can be computed beside an untouched layer at run time."""
    method = method_of(adapter.method, adapter.path)
    return method.branches or method.low_rank


def title_of(adapter: Adapter) -> str:
    """What people call the adapter's method."""
    return described(adapter)[0]


def described(adapter: Adapter) -> tuple[str, str]:
    """The name of an adapter's method and what it does to a linear layer, both for people."""
    known = method_of(adapter.method, adapter.path)
    if adapter.method == LORA and not adapter.adds:
        return "DoRA", f"{known.does}, and brings its rows to trained lengths"
    return known.title, known.does


@cache
def _brought() -> dict[str, Method]:
    """The methods of other packages; those that are here can't be replaced."""
    found = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in METHODS:
            found[entry.name] = entry.load()
    return found
