"""The model as trained, as an ordinary model in torch whose weights can be exchanged one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vera_edge import merging as merge
from vera_edge.errors import PlanError
from vera_edge.merging import Prepared
from vera_edge.reference.model import load_dense, oriented


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
    for module in {name for adapter, _ in ready.model.adapters for name in adapter.vectors}:
        weight = merge.merged_weight(ready.model, module)
        model.get_submodule(module).weight.data = oriented(ready.model.checkpoint, module, weight)
    for adapter, _ in ready.model.adapters:
        for module, bias in adapter.biases.items():
            model.get_submodule(module).bias.data = torch.from_numpy(np.array(bias, np.float32))
    return model


def _check_names(model: Any, ready: Prepared) -> None:
    known = {name for name, _ in model.named_modules()}
    if missing := sorted(ready.model.checkpoint.linears.keys() - known):
        raise PlanError(
            f"{missing[0]} of {ready.model.checkpoint.path} goes by another name in transformers' model, so "
            "it can't be measured; choose formats yourself (--weights)"
        )
