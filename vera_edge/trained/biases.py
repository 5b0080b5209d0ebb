"""Biases that follow from the base's and from what a method trained beside its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError


def with_computed(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter`, aligned with `checkpoint`, with the biases that its layers have in the end.

    LoRA's `lora_bias` adds `scale * bias` to the layer's own. Raises MismatchError where it has none.
    """
    found: dict[str, Float32] = {}
    for module, change in adapter.vectors.items():
        if isinstance(change, LoraPair) and change.bias is not None:
            found[module] = bias_of(adapter, checkpoint, module) + np.float32(change.scale) * change.bias
    if not found:
        return adapter
    return replace(adapter, biases={**adapter.biases, **found}, computed=frozenset(found))


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
