"""The small files beside a model's weights: which ones belong to it, and how they're copied safely.

Tokenizer, chat template, generation, preprocessor and pooling settings, licence. Never code, never weights
but those of a layer that sentence-transformers puts behind the pooling, and nothing that a link would bring
in from outside the folder.

Which folder each is taken from, where an adapter's folder holds some too, is decided in `trained_files`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vera_edge.errors import CheckpointError
from vera_edge.storage.files import safe_join, sha256_bytes, write_atomic
from vera_edge.storage.json_text import canonical_json, read_json, read_value

# What a tokenizer's vocabulary is read from, any of them.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
TEMPLATE, TOKENIZER_CONFIG, GENERATION = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)
TEMPLATES = (TEMPLATE, "chat_template.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "normalizer.json",
    *TEMPLATES,
)
MODULES = "modules.json"  # how sentence-transformers makes embeddings: this, and a folder for each module
SENTENCES = (
    MODULES,
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
)
SIDE_FILES = (
    *TOKENIZER_FILES,
    GENERATION,
    *PROCESSORS,
    *SENTENCES,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
MORE_TEMPLATES = "additional_chat_templates"
# Of a module of sentence-transformers, in its folder.
MODULE_FILES = ("config.json", "model.safetensors")


def find(folder: Path) -> tuple[str, ...]:
    """The side files that a model's folder has, as relative names."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    names += [name for name in _of_modules(folder) if name not in names]
    if (folder / MORE_TEMPLATES).is_dir():
        names += sorted(f"{MORE_TEMPLATES}/{path.name}" for path in (folder / MORE_TEMPLATES).glob("*.jinja"))
    return tuple(names)


def modules_of(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module that modules.json names; none when it can't be read."""
    try:
        entries = read_value(folder / MODULES, CheckpointError)
        return [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (CheckpointError, TypeError, KeyError):
        return []


def _of_modules(folder: Path) -> list[str]:
    """The files of the modules behind the model itself."""
    paths = [path for kind, path in modules_of(folder) if path and kind != "Transformer"]
    names = [f"{path}/{name}" for path in paths for name in MODULE_FILES]
    return [name for name in names if _is_inside(name) and (folder / name).is_file()]


def _is_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name and ":" not in name


def copy(source: Path, target: Path, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Copy a model's side files, or only those named, from `source` to `target`; returns what was copied.

    Raises CheckpointError when one can't be read or is a link that leads out of its folder, OutputError when
    the target can't be written.
    """
    found = find(source) if names is None else tuple(names)
    SideFiles(dict.fromkeys(found, source)).copy(target)
    return found


@dataclass(frozen=True, eq=False)
class SideFiles:
    """A model's side files, which may come from several folders.

    folders: by name, the folder that a file is taken from. written: by name, the content of a file that is no
    folder's own. notes: sentences that say which files aren't the base's.
    """

    folders: Mapping[str, Path]
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.folders, *self.written]))

    def __contains__(self, name: str) -> bool:
        return name in self.folders or name in self.written

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a tokenizer of any kind."""
        return any(name in self for name in VOCABULARIES)

    def read(self, name: str) -> bytes:
        """A file's content. Raises CheckpointError when it can't be read or is a link that leads out."""
        if name in self.written:
            return self.written[name]
        path = safe_join(self.folders[name], name, CheckpointError)
        try:
            return path.read_bytes()
        except OSError as cause:
            raise CheckpointError(f"{path} can't be read: {cause.strerror}") from None

    def json(self, name: str) -> dict[str, Any]:
        """A file's JSON object, empty without such a file. Raises CheckpointError when it isn't one."""
        if name in self.written:
            found: dict[str, Any] = json.loads(self.written[name])
            return found
        if name not in self.folders:
            return {}
        return read_json(safe_join(self.folders[name], name, CheckpointError), CheckpointError)

    def where(self, name: str) -> Path:
        """What to call a file in a sentence."""
        return self.folders[name] / name if name in self.folders else Path(name)

    @property
    def pools(self) -> bool:
        """Whether they say how embeddings are made of hidden states."""
        folder = self.folders.get(MODULES)
        return folder is not None and "Pooling" in [kind for kind, _ in modules_of(folder)]

    def copy(self, target: Path) -> None:
        """Write all of them to the folder `target`; raises as `read`, and OutputError."""
        for name in self.names:
            write_atomic(target / name, self.read(name))

    def with_file(self, name: str, content: bytes) -> SideFiles:
        """The same with a file written anew."""
        return replace(self, written={**self.written, name: content})

    @property
    def digest(self) -> str:
        """Hex SHA-256 over names and contents."""
        return sha256_bytes(
            canonical_json({name: sha256_bytes(self.read(name)) for name in sorted(self.names)})
        )
