"""Draws the float32 graph of a decoder: ONNX Runtime GenAI's builder, and what it would leave out.

The builder reads a config that says nothing of windows and of scaled rotary embeddings, so that it can't get
them wrong; they're put in afterwards, as transformers computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge.errors import CheckpointError
from vera_edge.storage.json_text import read_json
from vera_edge_onnx.decoder import attention, build, builder_config, configs, rotary_graph

_EDITED = "drawn.onnx"


@dataclass(frozen=True)
class Drawing:
    """A float graph. source: the float32 model's folder. folder: the builder's, with the graph at `path`.

    config: transformers' text config. windows: of each layer, in tokens.
    """

    model: ir.Model
    source: Path
    architecture: str
    config: Any
    folder: Path
    windows: tuple[int | None, ...]
    file: str = _EDITED

    @property
    def path(self) -> Path:
        """The graph on disk, with its weights beside it."""
        return self.folder / self.file


def draw(source: Path, config: Any, architecture: str, folder: Path, fuse_qkv: bool) -> Drawing:
    """The graph of the float32 model in `source`, drawn in `folder` or taken from there.

    config: as transformers reads config.json. Raises TargetError when the builder, or what is put in
    afterwards, doesn't take the model.
    """
    text = config.get_text_config()
    found = tuple(attention.windows(text, architecture))
    if (folder / _EDITED).is_file():
        return Drawing(ir.load(folder / _EDITED), source, architecture, text, folder, found)
    given = folder.with_name(f"{folder.name}-source")
    raw = read_json(source / "config.json", CheckpointError)
    builder_config.write_folder(source, given, builder_config.for_builder(raw, text))
    # A window in the cache would ask every runtime but GenAI for a cache of that size from the start.
    options = {"fuse_qkv": str(fuse_qkv).lower(), "windowed_kv_cache": "false"}
    model = build.build(given, folder, architecture, options)
    rotary_graph.put_in(model, text, architecture)
    attention.put_in(model, found, attention.without_positions(text))
    configs.fix_shapes(model, folder)
    ir.save(model, folder / _EDITED)
    return Drawing(model, source, architecture, text, folder, found)
