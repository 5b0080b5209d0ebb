"""A transformers class as one config makes it: its parameters' names and shapes, without a value.

Which parameters a number of labels or of tokens decides is found by making the class with another one and
looking at what changes: no names of layers are known here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import transformers

from vera_edge.errors import CheckpointError
from vera_edge.quiet import first_line, quiet

Shape = tuple[int, ...]


class ModelClass:
    """The class called `name` with the settings of `config`, a config.json.

    where: what to call the config in a sentence. Raises CheckpointError when transformers has no such class,
    or can't make one of this config.
    """

    def __init__(self, name: str, config: Mapping[str, Any], where: str) -> None:
        self.name, self.config, self.where = name, config, where
        cls: Any = getattr(transformers, name, None)
        self.cls = cls
        if not _is_model(cls):
            raise CheckpointError(
                f"transformers {transformers.__version__} has no model class {name!r}, which {where} needs"
            )
        if config.get("model_type") != self.cls.config_class.model_type:
            raise CheckpointError(f"{where} is of model type {config.get('model_type')!r}, and {name} isn't")
        self._model = self._made(config)

    def _made(self, config: Mapping[str, Any]) -> Any:
        facts = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            with torch.device("meta"), quiet():
                return self.cls(self.cls.config_class.from_dict(facts))
        except Exception as cause:  # of transformers' and the model's own code
            raise CheckpointError(f"{self.where} describes no {self.name}: {first_line(cause)}") from None

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every parameter and buffer that a checkpoint may hold, by the model's own names."""
        return {name: tuple(value.shape) for name, value in self._model.state_dict().items()}

    @property
    def needed(self) -> tuple[str, ...]:
        """The parameters that can't be made up on loading."""
        patterns = self._model._keys_to_ignore_on_load_missing or ()
        return tuple(name for name in self.shapes if not any(re.search(one, name) for one in patterns))

    @property
    def tied(self) -> Mapping[str, str]:
        """The parameters that are another one, by name, unless config.json unties them."""
        return dict(self._model.all_tied_weights_keys or {})

    @property
    def padding(self) -> int | None:
        """The id of the padding token that its config has."""
        found = getattr(self._model.config.get_text_config(), "pad_token_id", None)
        return found if isinstance(found, int) else None

    @property
    def without_pooler(self) -> bool:
        """Whether the class can do without the layer behind a BERT's first token."""
        return "add_pooling_layer" in inspect.signature(self.cls.__init__).parameters

    @cached_property
    def _renamer(self) -> Any:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self._model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        state, prefix = self._model.state_dict(), self._model.base_model_prefix
        return lambda name: rename_source_key(name, renamings, converters, prefix, state)

    def place(self, stored: str) -> str | None:
        """The name that a checkpoint's tensor has in the model; None where the class has no place for it.

        A tensor that becomes a part of another one keeps the name of that.
        """
        name, joined = self._renamer(stored)
        return str(name) if joined is not None or name in self.shapes else None

    def depends_on(self, setting: str) -> dict[str, int]:
        """The parameters that `setting` ("labels", "tokens") gives their size, each with the axis of that."""
        if not (size := self.size(setting)):
            return {}
        changed = _with(self.config, setting, size + 1)
        other = {name: tuple(value.shape) for name, value in self._made(changed).state_dict().items()}
        return {
            name: next(axis for axis, size in enumerate(shape) if size != other[name][axis])
            for name, shape in self.shapes.items()
            if name in other and len(other[name]) == len(shape) and other[name] != shape
        }

    def size(self, setting: str) -> int:
        """How many labels or tokens the class is made for; 0 tokens where it reads none."""
        config = self._model.config
        if setting == "labels":
            return int(config.num_labels)
        return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)

    def resized(self, setting: str, size: int) -> ModelClass:
        """The class for another number of labels or tokens."""
        return ModelClass(self.name, _with(self.config, setting, size), self.where)


def _is_model(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)


def _with(config: Mapping[str, Any], setting: str, size: int) -> dict[str, Any]:
    return with_labels(config, size) if setting == "labels" else with_tokens(config, size)


def with_labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """`config` for so many labels; their names stay where there are as many."""
    named = config.get("id2label")
    if isinstance(named, Mapping) and len(named) == count:
        return dict(config)
    names = {str(number): f"LABEL_{number}" for number in range(count)}
    changed = {key: value for key, value in config.items() if key != "num_labels"}
    return changed | {
        "id2label": names,
        "label2id": {label: int(number) for number, label in names.items()},
    }


def with_tokens(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """`config` for a vocabulary of `count` tokens, where it says how many there are."""
    changed, text = dict(config), config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        changed["text_config"] = {**text, "vocab_size": count}
    if "vocab_size" in config or "text_config" not in changed:
        changed["vocab_size"] = count
    return changed
