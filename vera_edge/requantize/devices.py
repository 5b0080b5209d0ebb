"""Where rounding computes: compiled loops on the processor, or torch on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vera_edge.errors import PlanError
from vera_edge.requantize.gram import Gram

AUTO, CPU = "auto", "cpu"
DEVICES = (AUTO, CPU, "cuda", "mps")


def chosen(name: str) -> str | None:
    """torch's name of a device that is there; None for the processor's compiled loops.

    "auto" is cuda where that is there, else mps, else the processor. Raises PlanError for a name that isn't
    known, or a device that isn't there.
    """
    if name not in DEVICES:
        raise PlanError(f"no device is called {name!r}; known: {', '.join(DEVICES)}")
    if name == CPU:
        return None
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == AUTO:
        return next((device for device, is_there in there.items() if is_there), None)
    if not there[name]:
        raise PlanError(
            f"there is no {name} device that torch {torch.__version__} can use; choose cpu or auto instead"
        )
    return name


def placed(gram: Gram, device: str | None) -> Gram:
    """A Gram matrix where it is computed with; device: as `chosen` gives it."""
    if device is None:
        return gram
    from vera_edge.requantize.torch_gram import TorchGram

    return TorchGram.placed(gram, device)


def told(device: str | None) -> str | None:
    """A device as records name it, by its model too: bytes are those of one kind. None: the processor."""
    if device is None:
        return None
    import torch

    return f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device


@contextmanager
def enough_memory(device: str | None, what: str) -> Iterator[None]:
    """Raise PlanError where a device, as `chosen` gives it, has no room for what is held on it."""
    if device is None:
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise PlanError(f"the memory of {told(device)} doesn't hold {what}; choose cpu instead") from None
