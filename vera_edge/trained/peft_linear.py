"""One linear's weight as PEFT's own layer merges it, for methods that have no arithmetic of ours.

A model of nothing but the adapted linears, whose weights take no memory, is put in PEFT's wrapper once, with
all that the adapter trained. A layer then gets its weight, merges, and gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.adapters.reading import title_of
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.quiet import first_line, quiet
from vera_edge.trained.peft_config import config_of, state_of

_NAME = "merged"
_known: WeakKeyDictionary[Adapter, _Layers] = WeakKeyDictionary()
_making = Lock()


def merged(
    adapter: Adapter, module: str, weight: Float32, bias: Float32 | None = None
) -> tuple[Float32, Float32 | None]:
    """A linear's weight (out, in), and its bias where it has one, with the adapter in them, float32.

    Safe in threads, one layer at a time. Raises MismatchError when PEFT refuses the adapter.
    """
    with _making:
        if adapter not in _known:
            _known[adapter] = _Layers.of(adapter)
        return _known[adapter].merged(module, weight, bias)


@dataclass
class _Layers:
    """The adapted linears of a model in PEFT's layers, by the names that they have in the checkpoint."""

    path: str
    layers: Mapping[str, Any]
    wrapped: Any = field(repr=False)

    @classmethod
    def of(cls, adapter: Adapter) -> _Layers:
        import peft
        import torch

        trained = adapter.as_trained or adapter
        names = dict(zip(adapter.vectors, trained.vectors, strict=True))
        model = torch.nn.Module()
        for module, change in adapter.vectors.items():
            shape = change.shape if isinstance(change, PeftTensors) else None
            if shape is None:
                raise MismatchError(f"{adapter.path} adapts {module}, which isn't a linear layer of the base")
            _place(model, names[module], *shape)
        try:
            with quiet():
                config = config_of(trained)
                config.task_type = None
                wrapped = peft.PeftModel(model, config, adapter_name=_NAME)
                peft.set_peft_model_state_dict(wrapped, state_of(trained), adapter_name=_NAME)
                check_held(wrapped, trained, _NAME)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError) as cause:
            raise MismatchError(
                f"PEFT's layers can't take {adapter.path} ({title_of(adapter)}): {first_line(cause)}"
            ) from None
        wrapped.eval()
        found = {module: wrapped.base_model.model.get_submodule(name) for module, name in names.items()}
        return cls(str(adapter.path), found, wrapped)

    def merged(self, module: str, weight: Float32, bias: Float32 | None) -> tuple[Float32, Float32 | None]:
        import torch

        layer = self.layers[module]
        base = layer.get_base_layer()
        before = base.weight.data
        base.weight.data = torch.from_numpy(np.array(weight, np.float32))
        base.bias = None if bias is None else torch.nn.Parameter(torch.from_numpy(np.array(bias, np.float32)))
        try:
            with torch.no_grad(), quiet():
                layer.merge(adapter_names=[_NAME])
            found: Float32 = base.weight.data.float().numpy().copy()
            biased = None if base.bias is None else base.bias.data.float().numpy().copy()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as cause:
            raise AdapterError(f"PEFT can't merge {module} of {self.path}: {first_line(cause)}") from None
        finally:
            layer.merged_adapters.clear()
            base.weight.data, base.bias = before, None
        return found, biased


def _place(model: Any, name: str, out: int, inside: int) -> None:
    """Put a linear without memory of its own in a tree of modules, by its name."""
    import torch

    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, torch.nn.Module())
        model = getattr(model, parent)
    with torch.device("meta"):
        linear = torch.nn.Linear(inside, out, bias=False)
    linear.weight = torch.nn.Parameter(torch.zeros(()).expand(out, inside), requires_grad=False)
    model.add_module(last, linear)


def check_held(wrapped: Any, adapter: Adapter, name: str) -> None:
    """Raise MismatchError unless PEFT would save for the adapter's layers just what was read."""
    import peft
    import torch

    wanted = state_of(adapter)
    held = peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    for key, values in wanted.items():
        there = held.get(key)
        if there is None or there.shape != values.shape or not torch.equal(there.float(), values.float()):
            raise MismatchError(
                f"PEFT has no place for {key} of {adapter.path} in this base; its config names other layers, "
                "or was written by another version"
            )
    layers = tuple(f"base_model.model.{module}." for module in adapter.vectors)
    own = {key for key in held if key.startswith(layers) and ".base_layer." not in key}
    if unfilled := sorted(own - wanted.keys()):
        raise MismatchError(f"{adapter.path} holds no {unfilled[0]}, which its config asks for")
