"""Weight formats: how a linear's weight is stored, one module for each, and the registry that finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats.bnb4 import Bnb4, Bnb4Weight
from vera_edge.formats.bnb8 import Int8, Int8Weight
from vera_edge.formats.dense import Dense
from vera_edge.formats.weight import Layout, StoredLinear, Weight, WeightFormat, dequantize, row_chunks
from vera_edge.tensors import TensorFolder

__all__ = [
    "FORMATS",
    "Bnb4Weight",
    "Int8Weight",
    "Layout",
    "StoredLinear",
    "Weight",
    "WeightFormat",
    "dequantize",
    "find_linears",
    "get",
    "load",
    "row_chunks",
]

FORMATS: Mapping[str, WeightFormat] = {
    "fp32": Dense("fp32"),
    "fp16": Dense("fp16"),
    "bf16": Dense("bf16"),
    "nf4": Bnb4("nf4"),
    "fp4": Bnb4("fp4"),
    "int8": Int8(),
}


def get(name: str) -> WeightFormat:
    """The format called `name`; raises FormatError when there is none."""
    if name not in FORMATS:
        raise FormatError(f"no weight format is called {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def find_linears(tensors: TensorFolder, config: Mapping[str, Any]) -> dict[str, StoredLinear]:
    """Every linear of a checkpoint, by module name, in file order."""
    found: dict[str, StoredLinear] = {}
    for weight_format in FORMATS.values():
        for module, linear in weight_format.find(tensors, config).items():
            if module in found:
                raise CheckpointError(
                    f"{module} is stored both as {found[module].format} and {linear.format}"
                )
            found[module] = linear
    return found


def load(tensors: TensorFolder, linear: StoredLinear) -> Weight:
    """One linear's weight in memory."""
    return get(linear.format).load(tensors, linear)
