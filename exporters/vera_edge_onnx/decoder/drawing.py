"""Draws the float32 graph of a decoder: ONNX Runtime GenAI's builder, and what it would leave out.

The builder reads a config that says nothing of windows and of scaled rotary embeddings, so that it can't get
them wrong; they're put in afterwards, as transformers computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError
from vera_edge.merging.computed import ComputedTensors
from vera_edge.storage.json_text import read_json
from vera_edge_onnx.decoder import attention, build, builder_config, configs, rotary_graph
from vera_edge_onnx.graph import sites
from vera_edge_onnx.graph.computed import load, rows_file, save
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.skeleton import Skeleton

_EDITED = "drawn.onnx"


@dataclass(frozen=True)
class Drawing:
    """A float graph. source: the float32 model. folder: the builder's, with the graph at `path`.

    config: transformers' text config. windows: of each layer, in tokens.
    """

    model: ir.Model
    source: Checkpoint
    architecture: str
    config: Any
    folder: Path
    windows: tuple[int | None, ...]
    file: str = _EDITED

    @property
    def path(self) -> Path:
        """The graph on disk, with its weights beside it but for those that are computed."""
        return self.folder / self.file


def draw(source: Checkpoint, config: Any, architecture: str, folder: Path, fuse_qkv: bool) -> Drawing:
    """The graph of a float32 model, drawn in `folder` or taken from there.

    source: in a folder of its own; where its weights are `ComputedTensors` the graph's are computed too.
    config: as transformers reads config.json. Raises TargetError when the builder, or what is put in
    afterwards, doesn't take the model, Computed when it has to be drawn from weights that are there.
    """
    text = config.get_text_config()
    found = tuple(attention.windows(text, architecture))
    computed = source.tensors if isinstance(source.tensors, ComputedTensors) else None
    drawn = folder / _EDITED
    if drawn.with_name(rows_file(drawn.name)).is_file():
        model = ir.load(drawn) if computed is None else load(drawn, computed)
        return Drawing(model, source, architecture, text, folder, found)
    given = folder.with_name(f"{folder.name}-source")
    raw = read_json(source.path / "config.json", CheckpointError)
    builder_config.write_folder(source.path, given, builder_config.for_builder(raw, text))
    # A window in the cache would ask every runtime but GenAI for a cache of that size from the start.
    options = {"fuse_qkv": str(fuse_qkv).lower(), "windowed_kv_cache": "false"}
    if computed is None:
        model = build.build(given, folder, architecture, options)
    else:
        model = build.build_from(Skeleton.of(computed), given, folder, architecture, options)
    rotary_graph.put_in(model, text, architecture)
    attention.put_in(model, found, attention.without_positions(text))
    configs.fix_shapes(model, folder)
    save(model, drawn)
    return Drawing(model, source, architecture, text, folder, found)


def sites_of(drawing: Drawing) -> tuple[Site, ...]:
    """The linear layers of a drawing, of the model it was drawn from."""
    source = drawing.source
    shapes = {module: linear.shape for module, linear in source.linears.items()}
    if isinstance(source.tensors, ComputedTensors):
        return sites.of_skeleton(drawing.model, shapes)
    return sites.find(drawing.model, shapes, source.dequantize)
