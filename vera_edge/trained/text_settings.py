"""What depends on the tokenizer that a model was trained with: its padding token, and where text ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.overlay import Overlay
from vera_edge.base.trained_files import gather
from vera_edge.formats.dense import is_embedding
from vera_edge.storage.side_files import TOKENIZER_CONFIG, VOCABULARIES, SideFiles
from vera_edge.tasks import task as tasks
from vera_edge.text import tokenizer


def with_text_settings(view: Checkpoint, brought: frozenset[str]) -> Checkpoint:
    """`view`, which has an overlay, with texts that end and are padded as its tokenizer says.

    brought: the tensors that adapters hold whole. Raises CheckpointError when a tokenizer that isn't the
    base's can't be read, or can't be one of this model's.
    """
    assert view.overlay is not None
    files, config, notes = view.overlay.files, dict(view.config), list(view.overlay.notes)
    elsewhere = {name for name, folder in files.folders.items() if folder != view.path}
    if elsewhere & set(VOCABULARIES):
        trained = any(is_embedding(name.removesuffix(".weight")) for name in brought)
        tokenizer.check(files, config, vocabulary_size(config), gather(view.path), trained)
    speaks = files.has_vocabulary and tasks.is_decoder(tasks.architecture(config))
    if speaks and elsewhere & {*VOCABULARIES, TOKENIZER_CONFIG}:
        files, more = tokenizer.ending(files, config)
        notes += more
    padding = _padding(files, config)
    if padding is not None:
        config["pad_token_id"] = padding
        notes.append(f"config.json names no padding token; the tokenizer's is taken (id {padding})")
    overlay = replace(view.overlay, config=config, files=files, notes=tuple(notes))
    return replace(view, config=config, overlay=overlay)


def with_fast_tokenizer(view: Checkpoint) -> Checkpoint:
    """`view` whose tokenizer is one that a device reads (tokenizer.json); as it is where there's none at all.

    Raises CheckpointError when none can be made of the vocabulary that is there.
    """
    if not view.files.has_vocabulary or tasks.main_input(view.config) != "input_ids":
        return view
    files = tokenizer.with_fast(view.files, view.config)
    overlay = view.overlay or Overlay(view.config, files)
    return replace(view, overlay=replace(overlay, files=files))


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """How many tokens a config.json says there are, 0 where it doesn't."""
    text = config.get("text_config")
    found = (text if isinstance(text, Mapping) and "vocab_size" in text else config).get("vocab_size")
    return found if type(found) is int else 0


def _padding(files: SideFiles, config: Mapping[str, Any]) -> int | None:
    """The tokenizer's padding token, where a classifier needs one to find a text's end and has none."""
    task, text = tasks.of(config), config.get("text_config")
    both = (config, text if isinstance(text, Mapping) else {})
    if task.name != "text-classification" or any(type(one.get("pad_token_id")) is int for one in both):
        return None
    if not files.has_vocabulary or _padded_by_default(config):
        return None
    return tokenizer.special_id(files, config, "pad_token")


def _padded_by_default(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a padding token for such a model that config.json needn't name."""
    import transformers

    model_type = config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        return True
    return getattr(transformers.CONFIG_MAPPING[model_type](), "pad_token_id", None) is not None
