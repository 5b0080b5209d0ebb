"""A model on an accelerator that is called, and answers, as one on the processor."""

from __future__ import annotations

from typing import Any

import torch


def placed(model: Any, device: str | None) -> Any:
    """The model, moved to torch's device of this name; None: as it is.

    Tensors that it is given go there, and its logits come back, as gradients do the other way.
    """
    if device is None:
        return model

    def there(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def back(_: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits.cpu()
        return output

    model.to(device)
    model.register_forward_pre_hook(there, with_kwargs=True)
    model.register_forward_hook(back)
    return model
