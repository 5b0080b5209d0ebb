"""Reads adapters and their base as the one model that was trained.

The base's folder alone doesn't say which model that is: the class may be another one (a classifier on a
masked language model), the head may have another number of labels, the vocabulary may have been resized, and
the tokenizer that was trained with lies beside the adapter. What comes of it is the base with an overlay;
everything after this reads that as it would any base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vera_edge.adapters import reading as adapters_of
from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.overlay import Overlay
from vera_edge.base.trained_as import TrainedAs
from vera_edge.base.trained_files import gather
from vera_edge.errors import MismatchError
from vera_edge.storage.tensors import RawTensor
from vera_edge.tasks import task as tasks
from vera_edge.trained.alignment import align
from vera_edge.trained.biases import with_computed
from vera_edge.trained.embeddings import with_tables
from vera_edge.trained.fit import check_class
from vera_edge.trained.text_settings import with_text_settings

if TYPE_CHECKING:
    from vera_edge.tasks.model_class import ModelClass

Weighted = tuple[WeightedAdapter, ...]
_WEIGHT = ".weight"
_SHOWN = 3


def read(
    base: Path | Checkpoint,
    adapters: Sequence[tuple[Path, float]] = (),
    tokenizer: Path | None = None,
    trained_as: TrainedAs | None = None,
) -> tuple[Checkpoint, Weighted]:
    """The base as the adapters (folders, each with its weight) were trained on it, and the adapters.

    Their layers go by the base's names (see `alignment`). tokenizer: a folder whose tokenizer, templates and
    generation settings win over the base's and the adapters'. trained_as: how the base in a folder was loaded
    in training.
    Raises AdapterError or CheckpointError when one can't be read, MismatchError when they don't belong
    together, or the model that was trained can't be told from them.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base, trained_as)
    found = [(adapters_of.read(path), weight) for path, weight in adapters]
    for adapter, _ in found:
        check_class(adapter, checkpoint.config)
    files = gather(checkpoint.path, [path for path, _ in adapters], tokenizer)
    own = tasks.architecture(checkpoint.config)
    name = tasks.class_of_all(checkpoint.config, [adapter for adapter, _ in found], files.pools)
    config = dict(checkpoint.config) if name == own else {**checkpoint.config, "architectures": [name]}
    view = checkpoint.overlaid(Overlay(config, files, notes=files.notes))
    aligned = tuple(WeightedAdapter(align(adapter, view), weight) for adapter, weight in found)
    aligned = tuple(WeightedAdapter(with_tables(adapter, view), weight) for adapter, weight in aligned)
    if name != own or _brings_new(view, aligned):
        view, aligned = _Fitting(view, aligned, name, own).fitted()
    aligned = tuple(WeightedAdapter(with_computed(adapter, view), weight) for adapter, weight in aligned)
    brought = frozenset(name for adapter, _ in aligned for name in adapter.modules_to_save)
    return with_text_settings(view, brought), aligned


def _brings_new(checkpoint: Checkpoint, adapters: Weighted) -> bool:
    """Whether an adapter holds a tensor that the base lacks, or has in another shape."""
    return any(
        name not in checkpoint.tensors or _shape(checkpoint, name) != tensor.shape
        for adapter, _ in adapters
        for name, tensor in adapter.modules_to_save.items()
    )


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """A tensor's shape as the unquantized model has it."""
    module = name.removesuffix(_WEIGHT)
    linear = checkpoint.linears.get(module) if name.endswith(_WEIGHT) else None
    if linear is None:
        return checkpoint.tensors[name].shape
    return linear.shape[::-1] if checkpoint.is_conv1d(module) else linear.shape


@dataclass
class _Fitting:
    """Finds what the class that was trained takes from the base and what from the adapters."""

    view: Checkpoint
    adapters: Weighted
    name: str
    own: str

    def __post_init__(self) -> None:
        from vera_edge.tasks.model_class import ModelClass  # imports torch

        where = str(self.view.path / "config.json")
        self.model: ModelClass = ModelClass(self.name, self.view.config, where)
        self.changed = self.name != self.own
        self.adapters = tuple(
            WeightedAdapter(self._as_stored(adapter), weight) for adapter, weight in self.adapters
        )
        self.brought = {
            name: tensor for adapter, _ in self.adapters for name, tensor in adapter.modules_to_save.items()
        }
        self.notes: list[str] = []

    def _as_stored(self, adapter: Adapter) -> Adapter:
        """`adapter` with its whole tensors by the base's names, where transformers renames those it loads."""
        view = self.view
        stored = [*view.other_names, *(f"{module}{_WEIGHT}" for module in view.linears)]
        names = {self.model.place(name): name for name in stored}
        changed = {name: names.get(self.model.place(name), name) for name in adapter.modules_to_save}
        if all(name in view.tensors or changed[name] == name for name in changed):
            return adapter
        whole = {
            name if name in view.tensors else changed[name]: tensor
            for name, tensor in adapter.modules_to_save.items()
        }
        return replace(adapter, modules_to_save=whole, as_trained=adapter.as_trained or adapter)

    def fitted(self) -> tuple[Checkpoint, Weighted]:
        self._check_places()
        dropped = self._dropped() if self.changed else frozenset()
        for setting in ("labels", "tokens"):
            self._resize(setting, dropped)
        config = dict(self.model.config)
        if self.changed and tasks.of_class(self.name).labelled:
            from vera_edge.tasks.model_class import with_labels

            config = with_labels(config, self.model.size("labels"))
        placed = self._placed(dropped)
        config, placed = self._untied(config, placed)
        self._check_whole(placed, dropped)
        overlay = Overlay(
            config,
            self.view.files,
            dropped | self._replaced_parts(placed),
            placed,
            self.adapters[0][0].path / "adapter_model.safetensors" if self.adapters else None,
            (*self._class_notes(dropped), *self.notes, *self.view.notes),
        )
        return self.view.overlaid(overlay), self.adapters

    def _check_places(self) -> None:
        """Raise MismatchError for a tensor of an adapter's that the class has no place for."""
        for adapter, _ in self.adapters:
            for name in adapter.modules_to_save:
                if self.model.place(name) is None:
                    raise MismatchError(
                        f"{adapter.path} holds {name}, which a {self.name} has no place for; its config must "
                        "name the class it was trained on (task_type, or auto_mapping without one)"
                    )

    def _dropped(self) -> frozenset[str]:
        """The base's tensors that the class has no place for: the head that it was saved with."""
        checkpoint, names = self.view, set[str]()
        for module, linear in checkpoint.linears.items():
            if self.model.place(f"{module}{_WEIGHT}") is None:
                names |= set(linear.tensors.values())
        return frozenset(names | {name for name in checkpoint.other_names if self.model.place(name) is None})

    def _shapes(self, dropped: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """The shape of all that is there, by the model's names; the adapters' before the base's."""
        stored = [name for name in self.view.other_names if name not in dropped]
        stored += [f"{module}{_WEIGHT}" for module in self.view.linears]
        shapes = {self.model.place(name): _shape(self.view, name) for name in stored if name not in dropped}
        shapes |= {self.model.place(name): tensor.shape for name, tensor in self.brought.items()}
        return {name: shape for name, shape in shapes.items() if name is not None}

    def _resize(self, setting: str, dropped: frozenset[str]) -> None:
        """Make the class for as many labels or tokens as the adapter's tensors have rows for.

        Raises MismatchError when some of what that decides came and some didn't.
        """
        shapes, known = self._shapes(dropped), self.model.shapes
        wrong = {name for name, shape in shapes.items() if known.get(name, shape) != shape}
        axes = self.model.depends_on(setting) if wrong else {}
        brought = {self.model.place(name) for name in self.brought}
        sizes = {
            name: shapes[name][axis]
            for name, axis in axes.items()
            if name in shapes and len(shapes[name]) == len(known[name])
        }
        asked = {sizes[name] for name in wrong & axes.keys() & brought}
        if not asked:
            return
        size, before = asked.pop(), self.model.size(setting)
        sizes |= dict.fromkeys(self._twins(axes.keys() & sizes.keys(), size, axes), size)
        if left := sorted(name for name, found in sizes.items() if found != size):
            raise MismatchError(
                f"{self._who()} was trained with {size} {setting}, and brings no {left[0]}, which has "
                f"{sizes[left[0]]} in {self.view.path}; save the adapter with all that was resized (for a "
                "vocabulary, embeddings and head: save_embedding_layers=True)"
            )
        self.model = self.model.resized(setting, size)
        if setting == "tokens":
            self.notes.append(f"the vocabulary has {size} tokens, as the adapter's; the base's has {before}")
        elif not self.changed:
            self.notes.append(f"the head has {size} labels, as the adapter's; the base's has {before}")

    def _twins(self, names: Collection[str], size: int, axes: Mapping[str, int]) -> set[str]:
        """Parameters that are one with another that came, which is then taken for them too: tied weights."""
        found = set[str]()
        for name, tensor in list(self.brought.items()):
            place = self.model.place(name) or ""
            source = self.model.tied.get(place)
            if source is None or source not in names:
                continue
            if place in axes and tensor.shape[axes[place]] == size:
                stored = [one for one in (*self.view.other_names, source) if self.model.place(one) == source]
                self.brought.setdefault(stored[0], tensor)
                found.add(source)
        return found

    def _placed(self, dropped: frozenset[str]) -> dict[str, RawTensor]:
        """The adapters' tensors that the base lacks, or has for another number of labels or tokens."""
        decided = {**self.model.depends_on("labels"), **self.model.depends_on("tokens")}
        found = {}
        for name, tensor in self.brought.items():
            place = self.model.place(name)
            there = name in self.view.tensors and name not in dropped
            if not there or (place in decided and _shape(self.view, name) != tensor.shape):
                found[name] = tensor
        return found

    def _untied(
        self, config: dict[str, Any], placed: dict[str, RawTensor]
    ) -> tuple[dict[str, Any], dict[str, RawTensor]]:
        """A head that was tied to the embeddings, and is other than those now, gets values of its own.

        One that is still the same is left out, as PEFT writes both. Without a resized vocabulary it's the
        merge's affair.
        """
        twins = {name: self.model.tied.get(self.model.place(name) or "") for name in placed}
        sources = {self.model.place(name): tensor for name, tensor in placed.items()}
        for name, source in twins.items():
            if source is None:
                continue
            if source not in sources:
                placed = {key: tensor for key, tensor in placed.items() if key != name}
            elif _equal(placed[name], sources[source]):
                placed = {key: tensor for key, tensor in placed.items() if key != name}
                self.adapters = tuple(
                    WeightedAdapter(_without(adapter, name), weight) for adapter, weight in self.adapters
                )
            else:
                config["tie_word_embeddings"] = False
        return config, placed

    def _replaced_parts(self, placed: Mapping[str, RawTensor]) -> frozenset[str]:
        """What a quantized weight of the base's is stored as, where an adapter's own takes its place."""
        names = set[str]()
        for name in placed:
            linear = self.view.linears.get(name.removesuffix(_WEIGHT))
            if linear is not None:
                names |= set(linear.tensors.values())
        return frozenset(names - placed.keys())

    def _check_whole(self, placed: Mapping[str, RawTensor], dropped: frozenset[str]) -> None:
        """Raise MismatchError when a tensor is nowhere: a head that was made up in training and not saved."""
        if not self.changed:
            return
        there = self._shapes(dropped).keys() | {self.model.place(name) for name in placed}
        missing = [name for name in self.model.needed if not {name, self.model.tied.get(name)} & there]
        if self.model.without_pooler and tasks.of_class(self.name).gives == tasks.EMBEDDINGS:
            missing = [name for name in missing if "pooler" not in name.split(".")]
        if missing:
            module = missing[0].rsplit(".", 1)[0]
            raise MismatchError(
                f"{self._who()} was trained on a {self.name}, and neither it nor {self.view.path} holds "
                f"{missing[0]}, which was made up when the training began; save the adapter with that module "
                f"(modules_to_save={[module]})"
            )

    def _who(self) -> str:
        return str(self.adapters[0][0].path) if self.adapters else str(self.view.path)

    def _class_notes(self, dropped: frozenset[str]) -> list[str]:
        if not self.changed:
            return []
        does = tasks.of_class(self.name).name or self.name
        base = self.view.path.resolve().name
        notes = [f"the model is a {self.name} ({does}), as trained; {base} was saved as {self.own or 'none'}"]
        if dropped:
            names = sorted(dropped)
            shown = ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")
            notes.append(f"left out, having no place in it: {shown} ({len(names)} tensors of the base's)")
        return notes


def _equal(one: RawTensor, other: RawTensor) -> bool:
    return one.shape == other.shape and np.array_equal(one.float32(), other.float32())


def _without(adapter: Adapter, name: str) -> Adapter:
    kept = {key: tensor for key, tensor in adapter.modules_to_save.items() if key != name}
    return replace(adapter, modules_to_save=kept)
