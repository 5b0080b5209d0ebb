"""A PEFT folder like another one, with other values of what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import CONFIG_NAME, open_folder, read_config
from vera_edge.adapters.reading import METHODS
from vera_edge.adapters.wrapper_names import PEFT_PREFIX
from vera_edge.arrays import Float32
from vera_edge.storage import side_files
from vera_edge.storage.files import staged_folder, write_atomic
from vera_edge.storage.json_text import settings_json
from vera_edge.storage.tensors import RawTensor, write_header


def write(
    adapter: Adapter,
    arrays: Mapping[str, Mapping[str, Float32]],
    out: Path,
    base_name: str,
    card: str,
    force: bool = False,
) -> None:
    """Write the adapter to `out` with `arrays`, by layer and by kind as in its file, whole or not at all.

    All other tensors stay as they are (projections, trained biases, modules that were saved whole), as do the
    tokenizer's files. base_name: what its config names as the base. card: its README.md.
    """
    tensors = _tensors(adapter, arrays)
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


def _tensors(adapter: Adapter, arrays: Mapping[str, Mapping[str, Float32]]) -> dict[str, RawTensor]:
    """Every tensor of the adapter's file under its name without wrappers, the given ones replaced."""
    folder = open_folder(adapter.path, read_config(adapter.path), METHODS[adapter.method].own)
    new = {f"{module}.{kind}": values for module, kinds in arrays.items() for kind, values in kinds.items()}
    found: dict[str, RawTensor] = {}
    for plain, stored in folder.tensors.items():
        name = f"{PEFT_PREFIX}{plain}" if plain in folder.prefixed else plain
        found[name] = RawTensor.of(new[plain]) if plain in new else stored
    return found
