"""A PEFT adapter's folder, read alike for every method: config, tensors, and what isn't the method's own.

Beside what a method trains, PEFT saves trained biases (since 0.21) and copies of `modules_to_save`. Any
tensor that isn't understood is refused, for one that is left out would change the model without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.adapters import wrapper_names
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, CheckpointError
from vera_edge.storage.json_text import read_json
from vera_edge.storage.tensors import FLOATS, RawTensor, TensorFolder

CONFIG_NAME = "adapter_config.json"
UNGATHERED = (
    "it was saved without gathering its parts (DeepSpeed ZeRO-3, FSDP): save it with "
    "stage3_gather_16bit_weights_on_model_save, or from a full state dict"
)
# PEFT stores these whole when the vocabulary was resized or when they are targets themselves.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "word_embeddings", "wte", "embed_in", "embed_out"})
_HEAD = "predictions.decoder"  # of a BERT
_HOLDERS = (".modules_to_save.", ".token_adapter.", ".base_layer.")  # parts of PEFT's names, of its own


@dataclass
class Others:
    """What an adapter's file holds beside its method's own tensors; see `Adapter`."""

    biases: dict[str, Float32] = field(default_factory=dict)
    modules_to_save: dict[str, RawTensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A folder as read: its config; its tensors by plain name, without PEFT's prefix, in order.

    keys: the names as stored. digest: hex SHA-256 of the tensors. notes: on how it was saved.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]
    keys: Mapping[str, str]
    prefixed: frozenset[str]  # of the plain names, those that had PEFT's prefix
    digest: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name with only characters that are safe in a file name on any system."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.path.resolve().name).strip(".-") or "adapter"

    def refuse(self, sentence: str) -> AdapterError:
        """The error that says this of the config."""
        return AdapterError(f"{self.path / CONFIG_NAME}: {sentence}")

    def integer(self, key: str) -> int:
        """An integer of the config. Raises AdapterError for anything else."""
        value = self.config.get(key)
        if type(value) is not int:
            raise self.refuse(f"{key} is {value!r} where an integer belongs")
        return value

    def text_or_none(self, key: str) -> str | None:
        """A text of the config, None for none. Raises AdapterError for anything else."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"{key} is {value!r} where a text belongs")
        return value or None

    def floats(self, name: str, *dimensions: int) -> Float32:
        """A tensor in float32. Raises AdapterError unless it has floats, in so many dimensions."""
        raw = self.tensors[name]
        if raw.dtype not in FLOATS or (dimensions and len(raw.shape) not in dimensions):
            belong = " or ".join(str(count) for count in dimensions)
            raise AdapterError(
                f"tensor {self.keys[name]} of {self.path} is {raw.dtype} of shape {list(raw.shape)} where "
                f"floats in {belong or 'some'} dimension{'s' * (dimensions != (1,))} belong"
            )
        return raw.float32()

    def others(self, own: Callable[[str], bool], title: str, bias_settings: tuple[str, ...]) -> Others:
        """What isn't the method's own. Raises AdapterError at a tensor that isn't understood."""
        found, bias = Others(), self.config.get("bias", "none")
        if bias not in ("none", *bias_settings):
            *most, last = ("none", *bias_settings)
            raise self.refuse(f"bias is {bias!r}, not {', '.join(most)} or {last}")
        for name in self.tensors:
            if not own(name):
                self._place(found, name, title, bias != "none")
        return found

    def _place(self, found: Others, name: str, title: str, biases: bool) -> None:
        module, _, kind = name.rpartition(".")
        if ".original_module." in name:
            return  # the base's own tensor, which PEFT 0.21 writes beside a trained copy by mistake
        if _is_saved_module(module, self.config):
            plain = name
            for part in _HOLDERS:
                plain = plain.replace(part, ".")
            found.modules_to_save[plain] = self.tensors[name]
        elif kind == "bias" and biases:
            found.biases[module.removesuffix(".base_layer")] = self.floats(name, 1)
        else:
            advice = f"; {UNGATHERED}" if "flat_param" in kind else ""
            raise AdapterError(
                f"tensor {self.keys[name]} of {self.path} isn't part of a {title} adapter as PEFT writes "
                f"it{advice}"
            )


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of the folder. Raises AdapterError where there is none that can be read."""
    if not path.is_dir():
        raise AdapterError(f"{path} isn't a folder; give the folder that holds {CONFIG_NAME}")
    if not (path / CONFIG_NAME).exists():
        nested = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_NAME}"))
        hint = f"; it has adapters in subfolders: give one of {', '.join(nested)}" if nested else ""
        raise AdapterError(f"{path} holds no {CONFIG_NAME}, so it isn't a PEFT adapter{hint}")
    return read_json(path / CONFIG_NAME, AdapterError)


def open_folder(path: Path, config: Mapping[str, Any], own: Callable[[str], bool]) -> AdapterFolder:
    """The folder with all of its tensors. own: whether a part of a tensor's name is the method's own.

    Raises AdapterError when one can't be read, is empty, or holds NaN or infinities.
    """
    stored = TensorFolder.open(path, "adapter_model", AdapterError)
    names, notes = wrapper_names.plain_names(stored, path, own)
    state, tensors, keys, prefixed = hashlib.sha256(), dict[str, RawTensor](), dict[str, str](), set[str]()
    for name, key in sorted(names.items()):
        raw = _read(stored, key, path)
        state.update(f"{name} {raw.dtype} {list(raw.shape)}\n".encode())
        state.update(raw.data.data)
        plain = name.removeprefix(wrapper_names.PEFT_PREFIX)
        tensors[plain], keys[plain] = raw, key
        if plain != name:
            prefixed.add(plain)
    told = (*stored.notes, *notes)
    return AdapterFolder(path, config, tensors, keys, frozenset(prefixed), state.hexdigest(), told)


def _read(stored: TensorFolder, key: str, path: Path) -> RawTensor:
    try:
        raw = stored.read(key)
    except CheckpointError as cause:
        raise AdapterError(str(cause)) from None
    if not raw.data.size:
        raise AdapterError(f"tensor {key} of {path} is empty (shape {list(raw.shape)}); {UNGATHERED}")
    if raw.dtype in FLOATS and not np.isfinite(raw.float32()).all():
        raise AdapterError(
            f"tensor {key} of {path} holds NaN or infinite values; its training diverged: use an earlier one"
        )
    return raw


def _is_saved_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT stores this module whole: `modules_to_save` names it or a parent, or it's an embedding.

    PEFT takes a name as an ending: "norm" also names `layers.0.input_layernorm`.
    """
    embeds = not _EMBEDDINGS.isdisjoint(module.split(".")) or module.endswith(_HEAD)
    return embeds or lies_in(module, named_whole(config))


def named_whole(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `modules_to_save`."""
    named = config.get("modules_to_save")
    return tuple(name for name in named if name and isinstance(name, str)) if isinstance(named, list) else ()


def lies_in(module: str, endings: tuple[str, ...]) -> bool:
    """Whether a module or one that it lies in has one of these endings."""
    parts = module.split(".")
    return any(".".join(parts[: count + 1]).endswith(endings) for count in range(len(parts)))
