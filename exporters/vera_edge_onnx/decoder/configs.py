"""The files beside the graph that tell a runtime how to use it, and the shapes Transformers.js asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge.errors import TargetError
from vera_edge.storage import side_files
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json, read_json, settings_json
from vera_edge_onnx import tokenizer_config, transformers_js

GENAI_CONFIG = "genai_config.json"
_ERRORS_ONLY = 3
# Where a folder came from is nobody's business, and would make two exports of one model differ.
_ORIGINS = ("_name_or_path", "_model_name_or_path")


def fix_shapes(model: ir.Model, graph: Path) -> None:
    """Give keys and values the head size as their last axis, where the builder leaves a symbol.

    Transformers.js makes the empty cache from these shapes and takes a symbol for 0. And let constants have
    the shapes of their values: the builder calls some of them scalars that are vectors of one.
    """
    for node in model.graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            node.outputs[0].shape = ir.Shape(node.attributes["value"].as_tensor().shape.numpy())
    size = _read(graph)["model"]["decoder"]["head_size"]
    for value in [*model.graph.inputs, *model.graph.outputs]:
        name, shape = value.name or "", value.shape
        is_cache = name.startswith(("past_key_values.", "present.")) and name.endswith((".key", ".value"))
        if is_cache and shape is not None and len(shape) == 4 and not isinstance(shape[3], int):
            value.shape = ir.Shape([*shape[:3], size])


def copy(source: Path, graph: Path, stage: Path, model: str, quiet: bool) -> None:
    """Write genai_config.json, config.json, generation_config.json and the tokenizer's files to `stage`.

    source: the float folder. graph: the builder's folder. model: the graph's name in `stage`, where its data
    files are.
    quiet: keep ONNX Runtime from warning of every input that has a default.
    """
    settings = _read(graph)
    decoder = settings["model"]["decoder"]
    decoder["filename"] = model
    if quiet:
        decoder["session_options"]["log_severity_level"] = _ERRORS_ONLY
    write_atomic(stage / GENAI_CONFIG, canonical_json(settings))
    config = read_json(source / "config.json", TargetError)
    kept = {key: value for key, value in config.items() if key not in _ORIGINS}
    write_atomic(stage / "config.json", settings_json(transformers_js.described(kept, stage / model)))
    own = side_files.copy(source, stage)
    # The builder saves the tokenizer in the form that GenAI reads, which isn't always the base's.
    for name in side_files.TOKENIZER_FILES:
        if (graph / name).is_file():
            write_atomic(stage / name, (graph / name).read_bytes())
        elif name in own and name not in ("chat_template.json", "chat_template.jinja"):
            (stage / name).unlink()
    tokenizer_config.mend(stage, ("input_ids", "attention_mask"))


def _read(graph: Path) -> dict[str, Any]:
    return read_json(graph / GENAI_CONFIG, TargetError)
