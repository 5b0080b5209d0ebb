"""Whether an adapter and a base belong together: the layers are there, shapes and names agree.

Shapes that contradict each other are refused. A base of another name isn't: folders get renamed, and a
quantized copy goes by a name of its own; the reader is told instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import lies_in, named_whole
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError, first_of


def check_fit(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Sentences a person should read about how `adapter` and `checkpoint` fit; empty when all agrees.

    Raises MismatchError when they don't: a layer that the base lacks or that has another shape, a bias or a
    saved module of another shape, a model class that isn't the base's.
    """
    check_class(adapter, checkpoint.config)
    for module in adapter.vectors:
        _check_layer(adapter, checkpoint, module)
    for module, bias in adapter.biases.items():
        _check_tensor(adapter, checkpoint, f"{module}.bias", bias.shape)
    _check_none_missing(adapter, checkpoint)
    new = [name for name in adapter.modules_to_save if name not in checkpoint.tensors]
    for name, tensor in adapter.modules_to_save.items():
        if name not in new:
            _check_tensor(adapter, checkpoint, name, tensor.shape)
    notes = [*adapter.notes, *checkpoint.notes, *_name_notes(adapter, checkpoint)]
    if adapter.digest in checkpoint.merged:
        notes.append(
            f"{checkpoint.path.resolve().name} was made by merging this very adapter, which comes on top"
        )
    if new:
        notes.append(
            f"the adapter brings {len(new)} tensors of its own that the base doesn't have: {first_of(new)}"
        )
    return tuple(notes)


def _check_layer(adapter: Adapter, checkpoint: Checkpoint, module: str) -> None:
    linear = checkpoint.linears.get(module)
    if linear is None:
        known = "isn't a linear layer there" if f"{module}.weight" in checkpoint.tensors else "isn't there"
        if module == "lm_head" and checkpoint.config.get("tie_word_embeddings"):
            raise MismatchError(
                f"{adapter.path} adapts lm_head, which {checkpoint.path} stores as its embeddings; save that "
                "base with a head of its own (tie_word_embeddings false) and give it"
            )
        raise MismatchError(
            f"{adapter.path} adapts {module}, which {known} in {checkpoint.path}; {_advice(adapter)}"
        )
    change, advice = adapter.vectors[module], _advice(adapter)
    outputs, inputs = change.out_features, change.in_features
    if outputs not in (None, linear.out_features):
        raise MismatchError(
            f"{adapter.path} was trained on a {module} with {outputs} outputs, and {checkpoint.path} has one "
            f"of shape {linear.out_features} x {linear.in_features}; {advice}"
        )
    if inputs not in (None, linear.in_features):
        raise MismatchError(
            f"{adapter.path} was trained on a {module} with {inputs} inputs, and {checkpoint.path} has one "
            f"of shape {linear.out_features} x {linear.in_features}; {advice}"
        )
    if adapter.saved is not None and linear.in_features > adapter.saved[0].shape[1]:
        raise MismatchError(
            f"{module} of {checkpoint.path} has {linear.in_features} inputs, and the projections saved in "
            f"{adapter.path} are made for at most {adapter.saved[0].shape[1]}; {advice}"
        )


def _check_tensor(adapter: Adapter, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != shape:
        found = "doesn't have it" if info is None else f"has one of shape {list(info.shape)}"
        raise MismatchError(
            f"{adapter.path} replaces {name} by a tensor of shape {list(shape)}, and {checkpoint.path} "
            f"{found}; {_advice(adapter)}"
        )


def _check_none_missing(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter without the modules that its config says it trained whole and that the base has."""
    for name in named_whole(adapter.config):
        kept, there = (
            any(lies_in(tensor.rpartition(".")[0], (name,)) for tensor in tensors)
            for tensors in (adapter.modules_to_save, checkpoint.tensors)
        )
        if there and not kept:
            raise MismatchError(
                f"{adapter.path} says it trained {name} whole (modules_to_save) and doesn't hold it; save "
                "it again, or empty modules_to_save in its config if that was never trained"
            )


def check_class(adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Refuse a base of another model family, where PEFT recorded the class (when no task type was given)."""
    mapping = adapter.config.get("auto_mapping")
    if not isinstance(mapping, Mapping):
        return
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not (isinstance(library, str) and library.startswith("transformers.models.") and model_type):
        return
    family, ours = _plain(library.split(".")[2]), _plain(str(model_type))
    if family.startswith(ours) or ours.startswith(family) or name in (architectures or ()):
        return
    raise MismatchError(
        f"{adapter.path} was trained on a {name} ({library}), and the base is a {model_type} model; "
        f"{_advice(adapter)}"
    )


def _name_notes(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[str]:
    if adapter.base_name is None:
        return
    names = [checkpoint.path.resolve().name]
    names += [str(checkpoint.config.get(key) or "") for key in ("_name_or_path", "_model_name_or_path")]
    if _last(adapter.base_name) not in {_last(name) for name in names}:
        yield (
            f"the adapter says it was trained on {adapter.base_name}, and the base given is {names[0]}; "
            "every shape fits, but only the base it was trained on gives the trained results"
        )


def _last(name: str) -> str:
    """The last part of a repository name or of a local path, in small letters."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _advice(adapter: Adapter) -> str:
    name = f" ({adapter.base_name})" if adapter.base_name else ""
    return f"give the base it was trained on{name}"
