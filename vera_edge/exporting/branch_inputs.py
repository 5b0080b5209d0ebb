"""The inputs of a graph with side-branches, by kind: what they have room for, and what an adapter brings.

An input's zeros change nothing, so an adapter brings the kinds that it has, each whole, and the others stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters.adapter import LORA, VERA, Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Float32
from vera_edge.exporting.branch_form import BIASES, INPUTS, OUTPUTS, PAIRS, VECTORS, Forms, kinds_of
from vera_edge.exporting.float_range import stored

Piece = tuple[str, int, int]  # module, start, stop: some of its outputs
Arrays = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, int]]  # (out, in) by module

# Factors less one, of all layers in a row: (rows, 1, sum of outputs) and (rows, 1, sum of inputs); and what
# biases grow by: (rows, 1, sum of outputs).
OUTPUT_GAIN, INPUT_GAIN, OUTPUT_BIAS = "branch.output_gain", "branch.input_gain", "branch.output_bias"


@dataclass(frozen=True)
class BranchInputs:
    """Which layers have inputs of which kind, and of which rank their pairs are (0: there are none).

    shapes: of every layer that has any. modules: by kind, of those that there are.
    """

    shapes: Shapes
    modules: Mapping[str, frozenset[str]]
    rank: int = 0

    @classmethod
    def plain(cls, shapes: Shapes, rank: int = 0) -> BranchInputs:
        """VeRA's vectors for all layers, or where there is a rank LoRA's pairs."""
        return cls(shapes, {PAIRS if rank else VECTORS: frozenset(shapes)}, rank)

    def sizes(self, kind: str) -> dict[str, int]:
        """Outputs of the layers that have inputs of this kind, by name in order."""
        return {module: self.shapes[module][0] for module in sorted(self.modules.get(kind, ()))}

    def pieces(self, kind: str, layout: Iterable[Piece]) -> tuple[Piece, ...]:
        """Those of the layout that are of layers with inputs of this kind."""
        return tuple(piece for piece in layout if piece[0] in self.modules.get(kind, ()))

    @property
    def is_plain(self) -> bool:
        """Whether all layers have either vectors or pairs, and nothing else."""
        return len(self.modules) == 1 and not {VECTORS, PAIRS}.isdisjoint(self.modules)

    def to_dict(self) -> dict[str, list[str]]:
        """Names of layers by kind, as a manifest has them; empty where `is_plain`."""
        return {} if self.is_plain else {kind: sorted(names) for kind, names in sorted(self.modules.items())}


def rank_of(forms: Forms) -> int:
    """The largest rank of an adapter's pairs, 0 where it has none."""
    return max((form.pair.rank for form in forms.values() if form.pair is not None), default=0)


def shared_of(inputs: BranchInputs, projections: str | None) -> str:
    """What adapters for these inputs have in common beside the base and the layout, in words of a digest."""
    if inputs.is_plain:
        return projections or f"{LORA} {inputs.rank}"
    return f"{projections or VERA} {LORA} {inputs.rank} {inputs.to_dict()}"


def name_of_a(module: str) -> str:
    """The input for A of a module."""
    return f"{module}.lora_A"


def name_of_b(piece: Piece, shapes: Shapes) -> str:
    """The input for B of a piece of a module."""
    module, start, stop = piece
    whole = (start, stop) == (0, shapes[module][0])
    return f"{module}.lora_B" if whole else f"{module}[{start}:{stop}].lora_B"


def arrays(
    adapter: Adapter,
    forms: Forms,
    inputs: BranchInputs,
    layout: Sequence[Piece],
    weight: float = 1.0,
    dtype: str = "float32",
) -> Arrays:
    """The values of all inputs of an adapter's kinds, by the input's name; zeros for other layers.

    Each layer with pairs has `NAME.lora_A` (1, in, rank), each of its pieces `NAME.lora_B` (1, rank, size),
    with the scale in it. The first axis is the batch's. layout: the pieces as the graph takes them. dtype:
    "float32" or "float16". Raises AdapterError when values are out of that type's range.
    """
    kinds, found = kinds_of(adapter), Arrays()
    where = str(adapter.path)
    if PAIRS in kinds:
        pairs = {module: form.pair for module, form in forms.items() if form.pair is not None}
        found |= _pairs(pairs, inputs, inputs.pieces(PAIRS, layout), weight, dtype, where)
    if OUTPUTS in kinds:
        factors = {module: form.outputs for module, form in forms.items() if form.outputs is not None}
        gains = [
            _gain(factors.get(name), stop, start) for name, start, stop in inputs.pieces(OUTPUTS, layout)
        ]
        found[OUTPUT_GAIN] = stored(np.concatenate(gains), dtype, f"factors of outputs in {where}")[
            None, None
        ]
    if INPUTS in kinds:
        factors = {module: form.inputs for module, form in forms.items() if form.inputs is not None}
        modules = dict.fromkeys(module for module, _, _ in inputs.pieces(INPUTS, layout))
        gains = [_gain(factors.get(module), inputs.shapes[module][1]) for module in modules]
        found[INPUT_GAIN] = stored(np.concatenate(gains), dtype, f"factors of inputs in {where}")[None, None]
    if BIASES in kinds:
        pieces = inputs.pieces(BIASES, layout)
        added = [_part(forms, module, start, stop) for module, start, stop in pieces]
        found[OUTPUT_BIAS] = stored(np.concatenate(added), dtype, f"biases in {where}")[None, None]
    return found


def _part(forms: Forms, module: str, start: int, stop: int) -> Float32:
    """What is added to some of a module's biases."""
    bias = forms[module].bias if module in forms else None
    return np.zeros(stop - start, np.float32) if bias is None else bias[start:stop]


def _gain(factors: Float32 | None, stop: int, start: int = 0) -> Float32:
    if factors is None:
        return np.zeros(stop - start, np.float32)
    gain: Float32 = factors[start:stop] - np.float32(1)
    return gain


def _pairs(
    pairs: Mapping[str, LoraPair],
    inputs: BranchInputs,
    pieces: Sequence[Piece],
    weight: float,
    dtype: str,
    where: str,
) -> Arrays:
    found = Arrays()
    for module in dict.fromkeys(module for module, _, _ in pieces):
        a = np.zeros((inputs.shapes[module][1], inputs.rank), np.float32)
        if (pair := pairs.get(module)) is not None:
            a[:, : pair.rank] = pair.a.T
        found[name_of_a(module)] = stored(a, dtype, f"lora_A of {module} in {where}")[None]
    for module, start, stop in pieces:
        b = np.zeros((inputs.rank, stop - start), np.float32)
        if (pair := pairs.get(module)) is not None:
            scaled: Float32 = np.float32(weight * pair.scale) * pair.b[start:stop]
            b[: pair.rank] = scaled.T
        name = name_of_b((module, start, stop), inputs.shapes)
        found[name] = stored(b, dtype, f"lora_B of {module} in {where}")[None]
    return found
