"""The small files beside a model's weights: which ones belong to it, and how they're copied safely.

Tokenizer, chat template, generation, preprocessor and pooling settings, licence. Never weights, never code,
and nothing that a link would bring in from outside the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.errors import CheckpointError
from vera_edge.files import safe_join, write_atomic

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
)
SIDE_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "modules.json",  # these four: how sentence-transformers makes embeddings
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
_TEMPLATES = "additional_chat_templates"


def find(folder: Path) -> tuple[str, ...]:
    """The side files that a model's folder has, as relative names."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    if (folder / _TEMPLATES).is_dir():
        names += sorted(f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja"))
    return tuple(names)


def copy(source: Path, target: Path, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Copy a model's side files, or only those named, from `source` to `target`; returns what was copied.

    Raises CheckpointError when one can't be read or is a link that leads out of its folder, OutputError when
    the target can't be written.
    """
    found = find(source) if names is None else tuple(names)
    for name in found:
        path = safe_join(source, name, CheckpointError)
        try:
            data = path.read_bytes()
        except OSError as cause:
            raise CheckpointError(f"{path} can't be read: {cause.strerror}") from None
        write_atomic(target / name, data)
    return found
