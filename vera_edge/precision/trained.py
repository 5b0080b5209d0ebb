"""The model as trained, as an ordinary model in torch whose weights can be exchanged one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vera_edge import merging as merge
from vera_edge.errors import PlanError
from vera_edge.merging import Prepared
from vera_edge.reference.layers import stack_of
from vera_edge.reference.model import TorchReference, load_dense, load_light, oriented
from vera_edge.reference.streamed import LayerStream


def check_adapters(ready: Prepared) -> None:
    """Raise PlanError when an adapter brings whole tensors, whose place in an export isn't measured."""
    for adapter, _ in ready.model.adapters:
        if adapter.modules_to_save:
            raise PlanError(
                f"{adapter.path} replaces {sorted(adapter.modules_to_save)[0]} whole, which automatic "
                "precision doesn't measure; choose formats yourself (--weights)"
            )


def trained_model(ready: Prepared) -> Any:
    """The model as trained as an ordinary float32 model: the deltas added to the weights.

    Raises PlanError when transformers knows the checkpoint's layers by other names.
    """
    model = load_dense(ready.model.checkpoint).eval()
    _check_names(model, ready)
    for module in _adapted(ready):
        model.get_submodule(module).weight.data = _merged(ready, module)
    _put_biases(model, ready)
    return model


def trained_stream(ready: Prepared) -> LayerStream | None:
    """The same, read layer by layer; None for a model that can't be run so.

    Raises PlanError when transformers knows the checkpoint's layers by other names.
    """
    adapted = _adapted(ready)

    def change(name: str, values: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        return _merged(ready, module) if module in adapted else values

    light = load_light(ready.model.checkpoint, change=change)
    if light is None:
        return None
    model, weights = light
    _check_names(model, ready)
    _put_biases(model, ready)
    stream = LayerStream.of(model, weights, [TorchReference(model.eval(), 0, has_adapter=False)])
    modules = ready.model.checkpoint.linears
    return stream if stream is not None and stack_of(model, modules)[0] == stream.name else None


def _adapted(ready: Prepared) -> set[str]:
    return {name for adapter, _ in ready.model.adapters for name in adapter.vectors}


def _merged(ready: Prepared, module: str) -> torch.Tensor:
    return oriented(ready.model.checkpoint, module, merge.merged_weight(ready.model, module))


def _put_biases(model: Any, ready: Prepared) -> None:
    for adapter, _ in ready.model.adapters:
        for module, bias in adapter.biases.items():
            model.get_submodule(module).bias.data = torch.from_numpy(np.array(bias, np.float32))


def _check_names(model: Any, ready: Prepared) -> None:
    known = {name for name, _ in model.named_modules()}
    if missing := sorted(ready.model.checkpoint.linears.keys() - known):
        raise PlanError(
            f"{missing[0]} of {ready.model.checkpoint.path} goes by another name in transformers' model, so "
            "it can't be measured; choose formats yourself (--weights)"
        )
