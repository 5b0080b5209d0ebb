"""The config that the graph's builder is given: the model's own, without what the builder would misread.

What is taken out here is put into the graph afterwards, from transformers' own code: how rotary embeddings
are scaled (`rotary`), which layers look through a window and which have no positions (`attention`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import settings_json
from vera_edge_onnx.decoder.rotary import context_length

_KEPT = ("rope_theta", "partial_rotary_factor")
# The builder reads a norm's epsilon under one name only; the families have others.
_EPSILON = "rms_norm_eps"
_EPSILONS = ("layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")


def for_builder(config: Mapping[str, Any], text_config: Any) -> dict[str, Any]:
    """`config` (a config.json) as the builder is to read it. text_config: transformers' reading of it."""
    context = context_length(text_config)
    changed = dict(config) | {"max_position_embeddings": context}
    changed.pop("rope_scaling", None)
    parameters = getattr(text_config, "rope_parameters", None)
    if parameters:
        nested = all(isinstance(value, Mapping) for value in parameters.values())
        changed["rope_parameters"] = (
            {kind: _unscaled(value) for kind, value in parameters.items()}
            if nested
            else _unscaled(parameters)
        )
    # Two unlike lengths make the builder ask for longrope's factors.
    if hasattr(text_config, "original_max_position_embeddings"):
        changed["original_max_position_embeddings"] = context
    epsilon = next((config[name] for name in _EPSILONS if name in config), None)
    epsilon = next((getattr(text_config, name) for name in _EPSILONS if hasattr(text_config, name)), epsilon)
    if hasattr(text_config, "no_rope_layers"):
        changed["no_rope_layers"] = [1] * int(text_config.num_hidden_layers)
    if epsilon is not None and not hasattr(text_config, _EPSILON):
        changed[_EPSILON] = epsilon
    return changed


def _unscaled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default"} | {key: parameters[key] for key in _KEPT if key in parameters}


def write_folder(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """A folder with the files of `source`, as links, but with another config.json."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    write_atomic(target / "config.json", settings_json(dict(config)))
