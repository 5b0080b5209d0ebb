"""A PEFT folder like another one, with other lambda vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import CONFIG_NAME, open_folder, read_config
from vera_edge.adapters.vera import METHOD, LambdaVectors
from vera_edge.adapters.wrapper_names import PEFT_PREFIX
from vera_edge.storage import side_files
from vera_edge.storage.files import staged_folder, write_atomic
from vera_edge.storage.json_text import settings_json
from vera_edge.storage.tensors import RawTensor, write_header

_VECTORS = ("vera_lambda_b", "vera_lambda_d")


def write(
    adapter: Adapter,
    vectors: Mapping[str, LambdaVectors],
    out: Path,
    base_name: str,
    card: str,
    force: bool = False,
) -> None:
    """Write the adapter to `out` with `vectors` (by PEFT's names, float32), whole or not at all.

    Projections, trained biases and modules that were saved whole stay as they are, as do the tokenizer's
    files. base_name: what its config names as the base. card: its README.md.
    """
    tensors = _tensors(adapter.path, vectors)
    config = {**adapter.config, "base_model_name_or_path": base_name}
    with staged_folder(out, force) as stage:
        with (stage / "adapter_model.safetensors").open("wb") as stream:
            shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            write_header(stream, shapes, {"format": "pt"})
            for tensor in tensors.values():
                stream.write(tensor.data.data)
        write_atomic(stage / CONFIG_NAME, settings_json(config))
        side_files.copy(adapter.path, stage)
        write_atomic(stage / "README.md", card.encode())


def _tensors(path: Path, vectors: Mapping[str, LambdaVectors]) -> dict[str, RawTensor]:
    """Every tensor of the adapter's file under its name without wrappers, the vectors replaced."""
    folder = open_folder(path, read_config(path), METHOD.own)
    found: dict[str, RawTensor] = {}
    for plain, stored in folder.tensors.items():
        module, _, kind = plain.rpartition(".")
        name = f"{PEFT_PREFIX}{plain}" if plain in folder.prefixed else plain
        found[name] = RawTensor.of(vectors[module].arrays[kind]) if kind in _VECTORS else stored
    return found
