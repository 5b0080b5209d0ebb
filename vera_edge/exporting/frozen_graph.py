"""A branch bundle's graph once more, with one adapter's vectors for constants, beside the same weights.

For consumers that can't be given an adapter, like Transformers.js: they open another graph instead. It costs
the graph's bytes and the vectors'; the weights stay where they are and are shared by all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.consistency import PLAIN_NAME
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.opened import AdapterChoice, Opened, open_graph
from vera_edge.errors import MismatchError, OutputError


@dataclass(frozen=True)
class Frozen:
    """The graph that was written, and its bytes on disk."""

    path: Path
    size: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"path": str(self.path), "size": self.size}


def freeze(folder: Path, adapter: AdapterChoice, name: str, force: bool = False) -> Frozen:
    """Write `model_<name>.onnx` beside the graph of the branch bundle in `folder`, and list it there.

    adapter: as for `Session.swap`. Raises BundleError when the bundle is damaged, MismatchError when it has
    its adapter merged or the adapter isn't for it, OutputError when the name is taken or the bundle signed.
    """
    manifest = bundle.read(folder)
    if PLAIN_NAME.fullmatch(name) is None:
        raise OutputError(f"{name!r} isn't a plain name for a graph; use letters, digits, dots and dashes")
    if manifest.mode != "branch":
        raise MismatchError(f"{folder} has its adapter merged; only a branch has vectors to freeze")
    bundle.check_unsigned(folder, "freeze first, then sign")
    model = manifest.path(manifest.model)
    path = model.with_name(f"{model.stem}_{name}{model.suffix}")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another --name, or use --force")
    opened = Opened(*open_graph(folder, manifest.kind, deep=False))
    opened.swap(adapter)
    data, file = _frozen(model, opened.vectors), path.relative_to(folder).as_posix()
    kept = {other: entry for other, entry in manifest.files.items() if other != file}
    bundle.add(manifest, file, data, known=kept)
    return Frozen(path, len(data))


def _frozen(path: Path, vectors: Vectors) -> bytes:
    """The graph in `path` whose vectors are these, and no longer inputs."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for values in (graph.input, graph.initializer):
        kept = [value for value in values if value.name not in vectors]
        del values[:]
        values.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in vectors.items())
    return model.SerializeToString(deterministic=True)
