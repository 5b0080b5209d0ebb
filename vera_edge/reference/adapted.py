"""Adapters on a model in torch: unmerged, in PEFT's own layers, on the projections they were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import vectors_of
from vera_edge.arrays import Float32
from vera_edge.errors import MismatchError
from vera_edge.quiet import first_line
from vera_edge.reference.peft_layers import put_on


@dataclass(frozen=True)
class Swap:
    """A parameter that the adapter replaces and PEFT doesn't switch back (trained biases)."""

    parameter: nn.Parameter
    trained: torch.Tensor
    base: torch.Tensor


def with_adapters(
    model: Any, adapters: Sequence[tuple[Adapter, float]], projections: Projections | None
) -> tuple[Any, list[Swap]]:
    """The model in PEFT's wrapper with all adapters on, each with its weight, and what it won't switch back.

    projections: VeRA's. Raises MismatchError when an adapter doesn't fit the model.
    """
    names = [f"adapter{index}" for index in range(len(adapters))]
    if projections is None:
        wrapped = put_on(model, adapters, names)
    else:
        wrapped = _with_vera(model, adapters, projections, names)
    swaps: list[Swap] = []
    for name, (adapter, _) in zip(names, adapters, strict=True):
        swaps += _set_saved_modules(wrapped.base_model.model, name, adapter)
        for module, values in adapter.biases.items():
            if module not in adapter.computed:
                swaps.append(_swap(wrapped.base_model.model, f"{module}.bias", values, adapter))
    if len(names) > 1 or projections is not None:
        wrapped.base_model.set_adapter(names)
    return wrapped, swaps


def _with_vera(
    model: Any, adapters: Sequence[tuple[Adapter, float]], projections: Projections, names: Sequence[str]
) -> Any:
    """The model with every VeRA adapter, on the projections that they were trained with."""
    import peft

    try:
        wrapped = peft.get_peft_model(model, _peft_config(adapters[0][0]), adapter_name=names[0])
        for name, (adapter, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.add_adapter(name, _peft_config(adapter))
    except (ValueError, TypeError, RuntimeError) as cause:
        raise MismatchError(
            f"PEFT can't put {adapters[0][0].path} on this base: {first_line(cause)}"
        ) from None
    layers = {
        module.removeprefix("base_model.model."): layer
        for module, layer in wrapped.named_modules()
        if hasattr(layer, "vera_lambda_b")
    }
    a, b = (torch.from_numpy(np.array(half)) for half in (projections.a, projections.b))
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        _set_vectors(layers, name, adapter, weight)
        for layer in layers.values():
            layer.vera_A[name], layer.vera_B[name] = a, b
    return wrapped


def _peft_config(adapter: Adapter) -> Any:
    import peft

    known = set(peft.VeraConfig.__dataclass_fields__)
    facts = {key: value for key, value in adapter.config.items() if key in known}
    # The projections are overwritten in any case, and trained biases are swapped here, not by PEFT.
    changed = {"save_projection": False, "bias": "none", "base_model_name_or_path": None}
    return peft.VeraConfig(**(facts | changed | {"inference_mode": True}))


def _set_vectors(layers: Mapping[str, Any], name: str, adapter: Adapter, weight: float) -> None:
    if unfilled := next((module for module in layers if module not in adapter.vectors), None):
        raise MismatchError(f"{adapter.path} holds no vectors for {unfilled}, which its config adapts")
    for module, vectors in vectors_of(adapter).items():
        if module not in layers:
            raise MismatchError(f"the base has no linear layer {module}, which {adapter.path} adapts")
        layer = layers[module]
        for kind, values in (("b", np.float32(weight) * vectors.lambda_b), ("d", vectors.lambda_d)):
            parameter = getattr(layer, f"vera_lambda_{kind}")[name]
            if tuple(parameter.shape) != values.shape:
                raise MismatchError(
                    f"lambda_{kind} of {module} in {adapter.path} has {values.size} values, and the base's "
                    f"layer takes {parameter.numel()}"
                )
            parameter.data = torch.from_numpy(np.array(values, np.float32))


def _set_saved_modules(model: Any, name: str, adapter: Adapter) -> list[Swap]:
    """Put the adapter's whole copies of modules where PEFT keeps them, so that it switches them itself.

    Returns what it won't: embeddings and heads that are saved since they are adapted, not trained whole.
    """
    swaps = []
    wrappers = {
        path: wrapper
        for path, wrapper in model.named_modules()
        if name in getattr(wrapper, "modules_to_save", ())
    }
    for key, raw in adapter.modules_to_save.items():
        path = next((path for path in wrappers if key.startswith(f"{path}.")), None)
        if path is None:
            swaps.append(_swap(model, key, raw.float32(), adapter))
            continue
        parameter = wrappers[path].modules_to_save[name].get_parameter(key.removeprefix(f"{path}."))
        if tuple(parameter.shape) != raw.shape:
            raise MismatchError(
                f"{key} of {adapter.path} has shape {list(raw.shape)}, and the base's {list(parameter.shape)}"
            )
        parameter.data = torch.from_numpy(np.array(raw.float32()))
    return swaps


def _swap(model: nn.Module, name: str, values: Float32, adapter: Adapter) -> Swap:
    """Put a tensor that the adapter holds whole in the place of the base's."""
    module, _, last = name.rpartition(".")  # an adapted layer holds the base's as a part
    known = dict(model.named_parameters(remove_duplicate=False))
    parameter = known.get(f"{module}.base_layer.{last}", known.get(name))
    if parameter is None or tuple(parameter.shape) != values.shape:
        raise MismatchError(
            f"{adapter.path} holds {name} of shape {list(values.shape)}, where the base has none like it"
        )
    base, trained = parameter.data, torch.from_numpy(np.array(values, np.float32))
    parameter.data = trained
    return Swap(parameter, trained, base)
