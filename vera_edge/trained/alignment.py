"""Finds an adapter's layers in a base whose checkpoint names them otherwise.

PEFT names layers as the model in memory does. A checkpoint may leave out the model's prefix
("h.0.attn.c_attn" where the model says "transformer.h.0.attn.c_attn"), carry one more, swap two parts of it,
or keep the names of an older transformers, which renames them on loading. Only names are matched here, never
by guess: every layer of a stack must be found in one stack, and just one must fit.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.wrapper_names import unwrapped
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats import checks
from vera_edge.tasks import task as tasks


def align(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter` with its layers under the names that `checkpoint` has for them.

    Unchanged when they are the same, or when no match was found: `check_fit` then says what is missing.
    `as_trained` of the result has the names PEFT used.
    """
    modules = list(adapter.vectors)
    if all(module in checkpoint.linears for module in modules):
        return adapter
    found = match(modules, checkpoint.linears) or _unwrapped(modules, checkpoint.linears)
    found = found or _as_transformers_renames(modules, checkpoint)
    if found is None:
        return adapter
    return replace(renamed(adapter, found, checkpoint.tensors), as_trained=adapter)


def align_names(adapter: Adapter, known: Collection[str], trained: Mapping[str, str]) -> Adapter:
    """`adapter` with its layers under `known` names, where no checkpoint is at hand; else unchanged.

    trained: what PEFT calls those layers that it calls otherwise (`trained_names`).
    """
    modules = list(adapter.vectors)
    if all(module in known for module in modules):
        return adapter
    theirs = {trained.get(name, name): name for name in known}
    by_their_names = match(modules, theirs) if trained else None
    if by_their_names is not None:
        found = {module: theirs[name] for module, name in by_their_names.items()}
    else:
        found = match(modules, known) or {}
    return replace(renamed(adapter, found, ()), as_trained=adapter) if found else adapter


def trained_names(adapter: Adapter) -> dict[str, str]:
    """What PEFT calls an aligned adapter's layers, by the names they have here, where the two differ."""
    trained = adapter.as_trained or adapter
    pairs = zip(adapter.vectors, trained.vectors, strict=True)
    return {here: theirs for here, theirs in pairs if here != theirs}


def renamed(adapter: Adapter, found: Mapping[str, str], tensors: Collection[str]) -> Adapter:
    """`adapter` with other names: those of its layers are `found`, its other tensors' are among `tensors`."""
    rename = _renamer(found, tensors)
    return replace(
        adapter,
        vectors={found[module]: vectors for module, vectors in adapter.vectors.items()},
        biases={rename(module): bias for module, bias in adapter.biases.items()},
        modules_to_save={rename(name): tensor for name, tensor in adapter.modules_to_save.items()},
        embeddings={
            rename(f"{module}.weight").removesuffix(".weight"): change
            for module, change in adapter.embeddings.items()
        },
    )


def read(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in folder `path`, aligned with `checkpoint`; raises AdapterError as `adapter.read` does."""
    return align(adapters.read(path), checkpoint)


def match(modules: Iterable[str], known: Collection[str]) -> dict[str, str] | None:
    """Each module's name among `known`; None unless all are found, each stack of layers in exactly one."""
    stacks, other = _stacks(modules)
    known_stacks, known_other = _stacks(known)
    found: dict[str, str] = {}
    for stack, layers in stacks.items():
        homes = [home for home, there in known_stacks.items() if layers <= there and _alike(stack, home)]
        home = stack if stack in homes else homes[0] if len(homes) == 1 else None
        if home is None:
            return None
        found |= {_join(stack, layer): _join(home, layer) for layer in layers}
    for module in other:
        names = [name for name in known_other if name == module or _extends(name, module)]
        name = module if module in names else names[0] if len(names) == 1 else None
        if name is None:
            return None
        found[module] = name
    return found if len(set(found.values())) == len(found) else None


def _unwrapped(modules: Iterable[str], known: Collection[str]) -> dict[str, str] | None:
    """As `match`, by what known names are without the parts that wrappers put there, which may be its own."""
    plain = {unwrapped(name)[0]: name for name in known}
    found = match(modules, plain) if len(plain) == len(known) else None
    return None if found is None else {module: plain[name] for module, name in found.items()}


def _stacks(names: Iterable[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Names by what stands before their first number ("model.layers"), and those without a number."""
    stacks: dict[str, set[str]] = defaultdict(set)
    other = []
    for name in names:
        parts = name.split(".")
        place = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
        if place is None:
            other.append(name)
        else:
            stacks[".".join(parts[:place])].add(".".join(parts[place:]))
    return stacks, other


def _join(stack: str, layer: str) -> str:
    return f"{stack}.{layer}" if stack else layer


def _alike(one: str, other: str) -> bool:
    """Whether two stacks' names differ by a prefix, or by the order of their parts, only."""
    parts, others = one.split("."), other.split(".")
    return _extends(one, other) or (parts[-1] == others[-1] and sorted(parts) == sorted(others))


def _extends(one: str, other: str) -> bool:
    """Whether one name is the other with a prefix."""
    return one.endswith(f".{other}") or other.endswith(f".{one}") or not (one and other)


def _as_transformers_renames(modules: Iterable[str], checkpoint: Checkpoint) -> dict[str, str] | None:
    """As `match`, by the names that transformers gives the checkpoint's layers on loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    model = empty_model(checkpoint)
    if model is None:
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    there = model.state_dict()
    inverse: dict[str, str] = {}
    for module in checkpoint.linears:
        name = f"{module}.weight"
        key, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if merged is None:  # else several of the checkpoint's weights become one
            inverse[key.removesuffix(".weight")] = module
    found = match(modules, inverse)
    return None if found is None else {module: inverse[name] for module, name in found.items()}


def empty_model(checkpoint: Checkpoint) -> Any:
    """transformers' model of the class that config.json names, without values; None where it knows none."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    cls: Any = getattr(transformers, tasks.architecture(checkpoint.config), None)
    if not _is_model_class(cls, transformers.PreTrainedModel):
        return None
    facts = checks.without_quantization(checkpoint.config)
    try:
        with torch.device("meta"):
            return cls(cls.config_class.from_dict(facts))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # a config of another model


def _is_model_class(found: Any, base: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, base)


def _renamer(found: Mapping[str, str], tensors: Collection[str]) -> Callable[[str], str]:
    """Renames modules and tensors that aren't adapted themselves, by the stack or module they belong to."""
    prefixes = {}
    for old, new in found.items():
        while old and new and old.rsplit(".", 1)[-1] == new.rsplit(".", 1)[-1]:
            old, new = old.rpartition(".")[0], new.rpartition(".")[0]
        prefixes[old] = new

    def rename(name: str) -> str:
        if name in found:
            return found[name]
        if name in tensors:
            return name
        for old, new in sorted(prefixes.items(), key=lambda pair: -len(pair[0])):
            if not old or name.startswith(f"{old}."):
                rest = name[len(old) :].lstrip(".")
                changed = f"{new}.{rest}" if new else rest
                if changed in tensors or f"{changed}.bias" in tensors:
                    return changed
        return name

    return rename


def names_in(model: Any, modules: Collection[str]) -> dict[str, str] | None:
    """What a model of transformers' calls `modules`, which a checkpoint or PEFT may name with another prefix;
    None when it has none like them.
    """
    known = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    return {name: name for name in modules} if known.issuperset(modules) else match(modules, known)


def as_loaded(adapter: Adapter, model: Any, speaks: bool) -> Adapter:
    """`adapter` by the names that the loaded model has, which is another class than PEFT wrapped where an
    embedding model was trained under a head for words.

    speaks: the model generates text; PEFT's classes for other tasks ask for methods that it may not have.
    """
    trained = adapter.as_trained or adapter
    config = dict(trained.config) if speaks else {**trained.config, "task_type": None}
    found = names_in(model, trained.vectors)
    if found is not None and found.keys() != set(found.values()):
        trained = renamed(trained, found, dict(model.named_parameters(remove_duplicate=False)))
        config |= {"target_modules": sorted(found.values()), "layers_to_transform": None}
        config["layers_pattern"] = None
    return replace(trained, config=config)
