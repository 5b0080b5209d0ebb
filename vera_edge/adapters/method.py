"""What an adapter's method is: PEFT's name for it, and how its folder is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import AdapterFolder


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    peft_type: as adapter_config.json has it. title: for people. own: whether a part of a tensor's name,
    between dots, is the method's own. read: the adapter of a folder, raising AdapterError. branches: whether
    what it trained can stand beside an untouched base at run time. low_rank: whether a pair of matrices that
    is made of it can, where their rank is small. does: what it does to a linear layer, for people.
    """

    peft_type: str
    title: str
    own: Callable[[str], bool]
    read: Callable[[AdapterFolder], Adapter]
    branches: bool = False
    low_rank: bool = False
    does: str = ""
