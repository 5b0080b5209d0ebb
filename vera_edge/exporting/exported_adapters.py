"""An export's adapters for any target: their names, and what they trained beside their vectors."""

from __future__ import annotations

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle.contents import NO_ADAPTER
from vera_edge.errors import PlanError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.storage.tensors import FLOATS, RawTensor


def names(request: ExportRequest) -> list[str]:
    """What each adapter is called in the manifest: the first of a branch "default", others by their folders.

    Merged, one whose folder's name is another's gets a number. Raises PlanError where a name that is asked
    for at run time would mean two things.
    """
    found: list[str] = []
    branch = request.plan.mode == "branch"
    for adapter, _ in request.model.adapters:
        name, number = "default" if branch and not found else adapter.name, 1
        if branch and name in found:
            raise PlanError(f"two adapters are called {name}; rename the folder of one of them")
        if branch and name == NO_ADAPTER:
            raise PlanError(
                f"an adapter can't be called {name}, by which one asks for the base alone; rename the folder "
                f"{adapter.path}"
            )
        while name in found:
            number += 1
            name = f"{adapter.name[:60]}-{number}"
        found.append(name)
    return found


def trained_whole(checkpoint: Checkpoint, adapter: Adapter) -> list[str]:
    """Biases and tensors that an adapter trained beside its vectors, which no file of vectors carries.

    PEFT saves the weight of an output head beside them; a copy of the base's changes nothing.
    """
    trained = {
        name for name, saved in adapter.modules_to_save.items() if not _is_base(checkpoint, name, saved)
    }
    return sorted([*adapter.biases, *trained])


def _is_base(checkpoint: Checkpoint, name: str, saved: RawTensor) -> bool:
    """Whether a tensor that was saved whole is a copy of the base's."""
    tensors = checkpoint.tensors
    if name not in tensors or tensors[name].dtype not in FLOATS or saved.dtype not in FLOATS:
        return False
    return np.array_equal(tensors.float32(name), saved.float32())
