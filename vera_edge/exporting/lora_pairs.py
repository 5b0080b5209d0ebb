"""A LoRA adapter's pairs as the inputs of a graph with side-branches, all of one rank: zeros fill up.

Each adapted module has `NAME.lora_A` (1, in, rank), and each of its pieces, as the graph takes them,
`NAME.lora_B` (1, rank, size) with the scale in it. The first axis is the batch's, so that rows of one batch
may run different adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Float32
from vera_edge.errors import MismatchError
from vera_edge.exporting.float_range import stored

Piece = tuple[str, int, int]  # module, start, stop: some of its outputs


@dataclass(frozen=True)
class PairShapes:
    """What a graph's inputs for pairs have room for. rank: of all. sizes: (out, in) by module."""

    rank: int
    sizes: Mapping[str, tuple[int, int]]


def name_of_a(module: str) -> str:
    """The input for A of a module."""
    return f"{module}.lora_A"


def name_of_b(piece: Piece, sizes: Mapping[str, tuple[int, int]]) -> str:
    """The input for B of a piece of a module."""
    module, start, stop = piece
    whole = (start, stop) == (0, sizes[module][0])
    return f"{module}.lora_B" if whole else f"{module}[{start}:{stop}].lora_B"


def arrays(
    adapter: Adapter, layout: Sequence[Piece], shapes: PairShapes, weight: float = 1.0, dtype: str = "float32"
) -> dict[str, npt.NDArray[Any]]:
    """Every input's values by its name; what the adapter leaves alone gets zeros.

    layout: the pieces as the graph takes them. dtype: "float32" or "float16". Raises AdapterError when values
    are out of that type's range, MismatchError when a pair doesn't fit.
    """
    found = {}
    for module in dict.fromkeys(module for module, _, _ in layout):
        a = np.zeros((shapes.sizes[module][1], shapes.rank), np.float32)
        if (pair := _pair(adapter, module, shapes)) is not None:
            a[:, : pair.rank] = pair.a.T
        found[name_of_a(module)] = stored(a, dtype, f"lora_A of {module} in {adapter.path}")[None]
    for module, start, stop in layout:
        b = np.zeros((shapes.rank, stop - start), np.float32)
        if (pair := _pair(adapter, module, shapes)) is not None:
            scaled: Float32 = np.float32(weight * pair.scale) * pair.b[start:stop]
            b[: pair.rank] = scaled.T
        name = name_of_b((module, start, stop), shapes.sizes)
        found[name] = stored(b, dtype, f"lora_B of {module} in {adapter.path}")[None]
    return found


def _pair(adapter: Adapter, module: str, shapes: PairShapes) -> LoraPair | None:
    change = adapter.vectors.get(module)
    if change is None:
        return None
    fits = isinstance(change, LoraPair) and change.adds and change.rank <= shapes.rank
    if not fits or (change.out_features, change.in_features) != shapes.sizes[module]:
        raise MismatchError(
            f"what {adapter.path} trained for {module} is no LoRA of rank {shapes.rank} or less for a layer "
            f"of {shapes.sizes[module][0]} x {shapes.sizes[module][1]}"
        )
    assert isinstance(change, LoraPair)
    return change
