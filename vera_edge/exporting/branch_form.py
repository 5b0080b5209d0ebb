"""What an adapter makes of a layer, as what can be computed beside it.

`y = outputs * (W (inputs * x)) + B A x + c + bias`: LoRA is a pair; IA3 (Liu et al., 2022) a factor for each
output or, for each input of what PEFT calls feedforward modules; DoRA (Liu et al., 2024) `m / |W + s B A|`
for each output, with the lengths of the rows of the base's exact values, and `s B A` times that. What another
method adds is a pair where it is of low rank, which is found out by arithmetic. c is what the layer's bias
grows by, where one was trained, or is scaled with the outputs as IA3's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import numpy as np

from vera_edge.adapters.adapter import Adapter, LayerChange
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.peft_methods import ADDING, IA3, PeftTensors
from vera_edge.adapters.reading import title_of
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.exporting.exact_pair import pair_of
from vera_edge.formats import row_chunks
from vera_edge.merging.delta import effect


@dataclass(frozen=True, eq=False)
class BranchForm:
    """One layer's: a pair, factors of outputs (out,) and of inputs (in,), and what its bias (out,) grows by.

    All float32, None where it has none.
    """

    pair: LoraPair | None = None
    outputs: Float32 | None = None
    inputs: Float32 | None = None
    bias: Float32 | None = None


# Kinds of inputs that a graph takes adapters by: VeRA's vectors, pairs, factors of outputs and of inputs, and
# what is added to biases.
VECTORS, PAIRS, OUTPUTS, INPUTS, BIASES = "vectors", "pairs", "outputs", "inputs", "biases"
Forms = Mapping[str, BranchForm]
# With the base they were computed with: the same adapter may be put beside another one.
_known: WeakKeyDictionary[Adapter, tuple[ref[Checkpoint] | None, Forms]] = WeakKeyDictionary()


def forms_of(adapter: Adapter, base: Checkpoint | None) -> Forms:
    """By module what `adapter`, of another method than VeRA, is beside the base's layers.

    base: its weights, which are read where the method needs them (`needs_base`); else it may be None.
    Raises MismatchError where a layer's change is none of these.
    """
    of, forms = _known.get(adapter, (None, None))
    if forms is None or (needs_base(adapter) and (of is None or of() is not base)):
        forms = {
            module: replace(_form(adapter, module, base), bias=_bias(adapter, module, base))
            for module in adapter.vectors
        }
        _known[adapter] = (None if base is None else ref(base), forms)
    return forms


def kinds_of(adapter: Adapter) -> dict[str, frozenset[str]]:
    """The layers that an adapter brings something of each kind for, of those kinds that it has."""
    found: dict[str, set[str]] = {}
    for module, change in adapter.vectors.items():
        biases = (BIASES,) if _has_bias(adapter, module) else ()
        for kind in (*_kinds(adapter, change), *biases):
            found.setdefault(kind, set()).add(module)
    return {kind: frozenset(modules) for kind, modules in found.items()}


def _kinds(adapter: Adapter, change: LayerChange) -> tuple[str, ...]:
    if isinstance(change, LambdaVectors):
        return (VECTORS,)
    if adapter.method == IA3:
        return (OUTPUTS,) if _scales_outputs(change) else (INPUTS,)
    return (PAIRS, OUTPUTS) if isinstance(change, LoraPair) and not change.adds else (PAIRS,)


def _has_bias(adapter: Adapter, module: str) -> bool:
    """Whether the layer's bias becomes another, beside another method's change than VeRA's."""
    change = adapter.vectors[module]
    own = isinstance(change, LoraPair) and change.bias is not None
    return not adapter.is_vera and (own or module in adapter.biases)


def _scales_outputs(change: LayerChange) -> bool:
    """Whether IA3 trained a column, as it does for layers that it doesn't call feedforward."""
    (factors,) = change.arrays.values()
    return factors.shape[1] == 1


def needs_base(adapter: Adapter) -> bool:
    """Whether what stands beside the base depends on values of the base: its weights, or for IA3 biases.

    So do tables of embeddings, which are held against those that the base was exported with.
    """
    made_of_weights = not adapter.adds and adapter.method not in ADDING
    if adapter.embeddings and not adapter.made:
        return True
    return made_of_weights or any(_has_bias(adapter, module) for module in adapter.vectors)


def _form(adapter: Adapter, module: str, base: Checkpoint | None) -> BranchForm:
    change = adapter.vectors[module]
    if isinstance(change, LoraPair) and change.adds:
        return BranchForm(change)
    if adapter.method == IA3:
        (factors,) = change.arrays.values()
        flat: Float32 = factors.reshape(-1)
        return BranchForm(outputs=flat) if _scales_outputs(change) else BranchForm(inputs=flat)
    if isinstance(change, LoraPair):
        assert base is not None
        return _normed(change, base, module)
    return BranchForm(_found_pair(adapter, module, base))


def _bias(adapter: Adapter, module: str, base: Checkpoint | None) -> Float32 | None:
    if not _has_bias(adapter, module):
        return None
    assert base is not None
    grown: Float32 = adapter.biases[module] - base.tensors.float32(f"{module}.bias")
    return grown


def _normed(pair: LoraPair, base: Checkpoint, module: str) -> BranchForm:
    """DoRA's factor of each row, in float64 as a merge has it, and the pair with it."""
    assert pair.magnitude is not None
    weight = base.load(module)
    factors = np.zeros(pair.out_features, np.float32)
    for start, stop in row_chunks(weight.shape):
        rows = np.float32(pair.scale) * pair.b[start:stop] @ pair.a
        rows += weight.rows(start, stop)
        norm = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        np.divide(pair.magnitude[start:stop], norm, out=factors[start:stop], where=norm > 0, casting="unsafe")
    return BranchForm(LoraPair(pair.a, factors[:, None] * pair.b, pair.scale), factors)


def _found_pair(adapter: Adapter, module: str, base: Checkpoint | None) -> LoraPair:
    change = adapter.vectors[module]
    assert isinstance(change, PeftTensors)
    shape = change.shape
    if shape is None:
        raise MismatchError(f"{adapter.path} adapts {module}, which isn't a linear layer of the base")
    weight = np.zeros(shape, np.float32)
    if needs_base(adapter):
        assert base is not None
        weight = base.dequantize(module)
    pair = pair_of(effect(module, weight, [(adapter, 1.0)], None))
    if pair is None:
        raise MismatchError(
            f"what {adapter.path} ({title_of(adapter)}) makes of {module} isn't of low rank, so it "
            "can't stand beside the layer; use --mode merged"
        )
    return pair
