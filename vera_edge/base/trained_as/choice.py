"""Which layers transformers has bitsandbytes quantize on loading, and in what dtype it loads the rest.

That is decided by the classes of the modules and by lists that each model class has (output embeddings, tied
weights, `_keep_in_fp32_modules`), so transformers itself is asked, with a model that has no values (torch's
"meta" device). No code of the checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_edge.base.trained_as.spec import TrainedAs
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.storage.tensors import FLOATS, TensorFolder
from vera_edge.tasks import task as tasks

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# A base is often trained for another task than config.json's: these are asked about what that class lacks.
_OTHER_TASKS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)


@dataclass
class LoadedTensors:
    """How the tensors of a float base are loaded, by their names in its files.

    quantized: the modules whose weight is quantized, and whether it is stored as (in, out), as Conv1D does.
    dtypes: what each float tensor is cast to, as safetensors spells it; a quantized weight, before that.
    """

    quantized: dict[str, bool] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


def choose(
    path: Path, tensors: TensorFolder, config: Mapping[str, Any], spec: TrainedAs, dtype: str
) -> LoadedTensors:
    """What transformers does to the base in `path` when it loads it as `spec` says, in `dtype`.

    The class is config.json's; where that has no module that `spec` skips, the one that has. Tensors which it
    lacks are loaded as by a class that has them.
    Raises CheckpointError when there's no such model or the base lacks a layer of it, FormatError when it'd
    make a layer of several tensors, PlanError when `spec` skips a module that isn't there.
    """
    found, left = LoadedTensors(), [name for name, info in tensors.items() if info.dtype in FLOATS]
    with _quiet():
        classes, config_object = _classes(config, dtype, path)
        facts = (config_object, dtype, path)
        first = _Model.of(classes[0], *facts)
        trained = _having(first, classes[1:], facts, spec)
        left = trained.place(left, found, spec)
        trained.check_whole(found, spec, path)
        for other in classes:
            if any(len(tensors[name].shape) == 2 for name in left):
                left = _Model.of(other, *facts).place(left, found, spec, by_default=True)
    found.dtypes |= dict.fromkeys(left, _STORED[dtype])
    return found


def _having(first: _Model, others: Iterable[Any], facts: tuple[Any, str, Path], spec: TrainedAs) -> _Model:
    """The model with all modules that `spec` skips: nobody skips what isn't there."""
    if not first.lacks(spec.skip):
        return first
    for other in others:
        model = _Model.of(other, *facts)
        if not model.lacks(spec.skip):
            return model
    raise PlanError(
        f"no linear layer of {facts[-1]} is called {first.lacks(spec.skip)[0]} or lies in it, so it can't be "
        f"skipped; there are {', '.join(sorted({name.rsplit('.', 1)[-1] for name in first.linears}))}"
    )


@dataclass
class _Model:
    """A transformers model without values.

    linears: by module, whether it's a Conv1D. keys: every tensor it has. wide: matches the tensors that stay
    in float32 whatever is asked for.
    """

    model: Any
    linears: Mapping[str, bool]
    keys: Mapping[str, Any]
    wide: re.Pattern[str] | None
    dtype: str

    @classmethod
    def of(cls, model_class: Any, config: Any, dtype: str, path: Path) -> _Model:
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device("meta"):
                model = model_class(config)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as cause:
            what = " ".join(str(cause).split())
            raise CheckpointError(
                f"{path / 'config.json'} describes no {model_class.__name__}: {what}"
            ) from None
        finally:
            torch.set_default_dtype(before)
        linears = {
            name: isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or type(module) is nn.Linear
        }
        wide = model._get_dtype_plan(getattr(torch, dtype))
        pattern = re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in wide)) if wide else None
        return cls(model, linears, model.state_dict(), pattern, dtype)

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that no linear layer has, as transformers reads them: a module, or its ending."""
        return [name for name in names if not any(_skips([name], linear) for linear in self.linears)]

    def replaced(self, spec: TrainedAs, by_default: bool = False) -> set[str]:
        """The layers that are quantized; by_default: without those that are left out when none is named."""
        from transformers.quantizers.base import HfQuantizer

        if not spec.quantized:
            return set()
        kept = HfQuantizer.get_modules_to_not_convert(
            self.model, list(spec.skip) or None, self.model._keep_in_fp32_modules, by_default
        )
        return {name for name in self.linears if not _skips(kept, name)}

    def place(
        self, names: Iterable[str], found: LoadedTensors, spec: TrainedAs, by_default: bool = False
    ) -> list[str]:
        """Say of each tensor that the model has what becomes of it; returns the others' names."""
        left, replaced = [], self.replaced(spec, by_default)
        for name, key, joined in self._keys_of(names):
            if key not in self.keys:
                left.append(name)
                continue
            module, _, last = key.rpartition(".")
            quantized = last == "weight" and module in replaced
            if quantized and joined:
                raise FormatError(
                    f"transformers makes {module} of several tensors ({name} is one) before it quantizes it, "
                    "and vera-edge can't; load it as in training, save_pretrained, and give that folder"
                )
            if quantized:
                found.quantized[name.removesuffix(".weight")] = self.linears[module]
            found.dtypes[name] = self._stored(key, quantized)
        return left

    def _stored(self, key: str, quantized: bool) -> str:
        if self.wide is not None and self.wide.search(key):
            return "F32"
        own = str(self.keys[key].dtype).removeprefix("torch.")
        return _STORED[self.dtype if quantized or own not in _STORED else own]

    def _keys_of(self, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
        """(name in the files, name in the model, whether it's joined with others there)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        prefix = self.model.base_model_prefix
        for name in names:
            key, joined = rename_source_key(name, renamings, converters, prefix, self.keys)
            if key not in self.keys:  # it may have the name that is new already
                plain, _ = rename_source_key(name, [], [], prefix, self.keys)
                key, joined = (plain, None) if plain in self.keys else (key, joined)
            yield name, key, joined is not None

    def check_whole(self, found: LoadedTensors, spec: TrainedAs, path: Path) -> None:
        """Raise CheckpointError when the base lacks the weight of a layer that would be quantized."""
        there = {key for _, key, _ in self._keys_of(found.dtypes)}
        tied = {*self.model.all_tied_weights_keys, *self.model.all_tied_weights_keys.values()}
        for module in sorted(self.replaced(spec)):
            if f"{module}.weight" not in there | tied:
                raise CheckpointError(
                    f"{path} lacks {module}.weight, which its config.json asks for; copy the model again"
                )


def _skips(patterns: list[str], module: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        return not should_convert_module(module, patterns)
    except re.error:
        return False


def _classes(config: Mapping[str, Any], dtype: str, path: Path) -> tuple[list[Any], Any]:
    """The model class that config.json names, those of other tasks, and the config as they take it."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    name = tasks.architecture(config)
    cls = getattr(transformers, name, None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known or config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model class {name or None!r}, which "
            f"{path / 'config.json'} names, so which of its layers were quantized can't be told; load it as "
            "in training, save_pretrained, and give that folder"
        )
    facts = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        found = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(facts)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as cause:
        what = " ".join(str(cause).split())
        raise CheckpointError(f"{path / 'config.json'} describes no model of its type: {what}") from None
    # Some classes make a part of themselves in the dtype that the config names.
    for part in (found, *(getattr(found, key, None) for key in found.sub_configs)):
        if part is not None:
            part.dtype = getattr(torch, dtype)
    classes = [cls]
    for task in _OTHER_TASKS:
        mapping = getattr(transformers, task)._model_mapping
        other = mapping.get(type(found), cls)
        classes += [other[0] if isinstance(other, tuple) else other]  # several, where a family has them
    return list(dict.fromkeys(classes)), found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' advice on a config off the terminal."""
    import transformers

    theirs = transformers.utils.logging
    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
