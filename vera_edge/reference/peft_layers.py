"""Adapters of any method in PEFT's own unmerged layers, which then hold just what their folders hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vera_edge.adapters.adapter import Adapter
from vera_edge.errors import MismatchError
from vera_edge.quiet import first_line
from vera_edge.trained.peft_config import config_of, state_of
from vera_edge.trained.peft_linear import check_held


def put_on(model: Any, adapters: Sequence[tuple[Adapter, float]], names: Sequence[str]) -> Any:
    """The model in PEFT's wrapper with every adapter, called by `names` and each with its weight.

    Raises MismatchError when PEFT refuses one, or doesn't hold what the adapter's folder holds.
    """
    import peft

    first = adapters[0][0]
    try:
        wrapped = peft.get_peft_model(model, config_of(first), adapter_name=names[0])
        for name, (adapter, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.add_adapter(name, config_of(adapter))
        for name, (adapter, _) in zip(names, adapters, strict=True):
            peft.set_peft_model_state_dict(wrapped, _with_saved(wrapped, adapter, name), adapter_name=name)
    except (ValueError, TypeError, RuntimeError, KeyError) as cause:
        raise MismatchError(f"PEFT can't put {first.path} on this base: {first_line(cause)}") from None
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        check_held(wrapped, adapter, name)
        if weight != 1:
            _weigh(wrapped, name, weight)
    return wrapped


def _with_saved(wrapped: Any, adapter: Adapter, name: str) -> Mapping[str, torch.Tensor]:
    """The adapter's state, and of modules that PEFT keeps whole what it has: they're put in place later."""
    import peft

    state = state_of(adapter)
    if not adapter.config.get("modules_to_save"):
        return state
    now = peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    return {**now, **state}


def _weigh(wrapped: Any, name: str, weight: float) -> None:
    """Scale what an adapter adds."""
    for module in wrapped.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight
