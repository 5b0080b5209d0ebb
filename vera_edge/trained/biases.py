"""Biases that follow from the base's and from what a method trained beside its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.trained.peft_linear import merged

# Methods that change a layer's outputs, the bias in them.
_OF_OUTPUTS = frozenset({"IA3", "ROAD"})


def with_computed(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter`, aligned with `checkpoint`, with the biases that its layers have in the end.

    LoRA's `lora_bias` adds `scale * bias` to the layer's own; IA3 scales it with the outputs.
    Raises MismatchError where it has none.
    """
    found: dict[str, Float32] = {}
    adapter = _with_shapes(adapter, checkpoint)
    for module, change in adapter.vectors.items():
        known = module in adapter.biases or f"{module}.bias" in checkpoint.tensors
        if known and adapter.method in _OF_OUTPUTS and isinstance(change, PeftTensors) and change.shape:
            before = bias_of(adapter, checkpoint, module)
            _, after = merged(adapter, module, np.zeros(change.shape, np.float32), before)
            if after is not None and not np.array_equal(before, after):
                found[module] = after
        if isinstance(change, LoraPair) and change.bias is not None:
            found[module] = bias_of(adapter, checkpoint, module) + np.float32(change.scale) * change.bias
    if not found:
        return adapter
    return replace(adapter, biases={**adapter.biases, **found}, computed=frozenset(found))


def _with_shapes(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter` whose layers, where PEFT's layers merge them, know how large they are in the base."""
    linears = checkpoint.linears
    changed = {
        module: replace(change, shape=linears[module].shape)
        for module, change in adapter.vectors.items()
        if isinstance(change, PeftTensors) and module in linears
    }
    return replace(adapter, vectors={**adapter.vectors, **changed}) if changed else adapter


def bias_of(adapter: Adapter, checkpoint: Checkpoint, module: str) -> Float32:
    """The bias that a layer had in training. Raises MismatchError where it has none."""
    if module in adapter.biases:
        return adapter.biases[module]
    name = f"{module}.bias"
    if name not in checkpoint.tensors:
        raise MismatchError(
            f"{adapter.path} trained a bias for {module}, which has none in {checkpoint.path}, so that "
            "nothing could hold it"
        )
    return checkpoint.tensors.float32(name)
