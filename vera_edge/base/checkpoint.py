"""A base model's folder: its config, its tensors, and which of them are the weights of linear layers.

Headers are read when it is opened, values when they are asked for. Nothing in the folder is trusted, and
nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vera_edge import formats
from vera_edge.arrays import Float32
from vera_edge.base.overlay import OverlaidFolder, Overlay
from vera_edge.base.trained_as import LoadedFolder, TrainedAs, loaded
from vera_edge.base.trained_files import gather
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats import StoredLinear, Weight, checks, gguf
from vera_edge.formats.dense import DTYPES, is_conv1d_module
from vera_edge.storage.files import safe_join, sha256_bytes
from vera_edge.storage.json_text import read_json
from vera_edge.storage.side_files import SideFiles
from vera_edge.storage.tensors import RawTensor, TensorFolder, WitnessedFolder

NAMED_WEIGHTS = (
    "transformers_weights"  # of config.json: a file of weights that isn't called model.safetensors
)
MERGE_RECORD = "vera_edge_merge.json"  # what a merge says of itself, beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint. `linears` is keyed by module name, as the checkpoint spells it.

    trained_as: how the base was loaded in training, where that was said; all else is of the base so loaded.
    overlay: what the model that was trained has otherwise; `config`, `tensors` and `linears` have it already.
    folder_tensors: those of the folder alone, where `tensors` are others.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: TensorFolder
    linears: Mapping[str, StoredLinear]
    trained_as: TrainedAs | None = None
    overlay: Overlay | None = None
    folder_tensors: TensorFolder | None = None

    @classmethod
    def open(cls, path: Path, trained_as: TrainedAs | None = None) -> Checkpoint:
        """Read config and headers of a Hugging Face folder, or of a GGUF file.

        trained_as: take the float base in `path` for what it was when it was loaded so, to the last bit; its
        weights are quantized as they are read, and nothing is written.
        Raises CheckpointError when something is missing, damaged or contradictory, FormatError when the
        weights are in a format that isn't known, MismatchError when the base is quantized, but otherwise.
        """
        tensors: TensorFolder
        config: Mapping[str, Any]
        linears: Mapping[str, StoredLinear]
        if gguf.is_gguf(path):
            tensors, config = gguf.open_model(path)
        else:
            tensors = TensorFolder.open(path, _stem(path))
            config = read_json(path / "config.json", CheckpointError)
        checks.named(config, path / "config.json", CheckpointError)
        linears = formats.find_linears(tensors, config)
        _check_agreement(path, config, linears)
        if trained_as is not None:
            tensors, config, linears = loaded(path, tensors, config, linears, trained_as)
        return cls(path, config, tensors, linears, trained_as)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences a person should read: how the folder is stored, what the trained model has otherwise."""
        own = () if self.overlay is None else self.overlay.notes
        return (*self.stored.notes, *formats.notes(self.config), *own)

    def overlaid(self, overlay: Overlay) -> Checkpoint:
        """The model that an adapter was trained on, where it differs from the folder's."""
        tensors = self.tensors
        if overlay.dropped or overlay.placed:
            tensors = OverlaidFolder(self.stored, overlay)
        linears = self.linears if tensors is self.tensors else formats.find_linears(tensors, overlay.config)
        return replace(
            self,
            config=overlay.config,
            tensors=tensors,
            linears=linears,
            overlay=overlay,
            folder_tensors=self.stored,
        )

    @property
    def stored(self) -> TensorFolder:
        """The folder's own tensors, without an overlay."""
        return self.tensors if self.folder_tensors is None else self.folder_tensors

    @property
    def placed(self) -> Mapping[str, RawTensor]:
        """Tensors that an adapter brought since the base lacks them, or has them in another shape."""
        return {} if self.overlay is None else self.overlay.placed

    @cached_property
    def files(self) -> SideFiles:
        """Its tokenizer, templates and settings, of whichever folder."""
        return gather(self.path) if self.overlay is None else self.overlay.files

    @property
    def quantized(self) -> bool:
        """Whether any linear is stored in a quantized format."""
        return any(linear.format not in DTYPES for linear in self.linears.values())

    def is_conv1d(self, module: str) -> bool:
        """Whether the unquantized model stores this linear as (in, out), as GPT-2's Conv1D does.

        A quantized linear is stored as (out, in) in any case.
        """
        linear = self.linear(module)
        return linear.transposed or (linear.format not in DTYPES and is_conv1d_module(module, self.config))

    def linear(self, module: str) -> StoredLinear:
        """The linear called `module`; raises CheckpointError when there is none."""
        if module not in self.linears:
            raise CheckpointError(f"{self.path} has no linear layer called {module}")
        return self.linears[module]

    def load(self, module: str) -> Weight:
        """One linear's weight as it is stored."""
        return formats.load(self.tensors, self.linear(module))

    def dequantize(self, module: str) -> Float32:
        """One linear's weight, exact in float32, as (out_features, in_features) however it is stored."""
        linear = self.linear(module)
        if linear.format in DTYPES and not linear.transposed:  # not whole in memory as it is stored, too
            return self.tensors.float32(linear.tensors["weight"])
        return formats.dequantize(self.load(module))

    def float32(self, name: str) -> Float32:
        """A float tensor by its name, as float32 in its stored orientation."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor called {name}")
        return self.tensors.float32(name)

    def making(self, names: Iterable[str]) -> int:
        """Bytes held while tensors are read, beside their own, where they're made of a base's floats."""
        return self.tensors.making(names) if isinstance(self.tensors, LoadedFolder) else 0

    @cached_property
    def other_names(self) -> tuple[str, ...]:
        """The tensors that aren't part of a linear's weight, in file order."""
        taken = {name for linear in self.linears.values() for name in linear.tensors.values()}
        return tuple(name for name in self.tensors if name not in taken)

    @cached_property
    def merged(self) -> frozenset[str]:
        """Digests of the adapters that `vera-edge merge` says it merged into this base; none when unread."""
        path = self.path / MERGE_RECORD
        if not path.is_file():
            return frozenset()
        try:
            told = read_json(path, CheckpointError)["report"]["adapters"]
            return frozenset(str(entry["digest"]) for entry in told)
        except (CheckpointError, KeyError, TypeError):
            return frozenset()

    @cached_property
    def layout_digest(self) -> str:
        """Hex SHA-256 of config and headers: what a plan is made for. Reads no tensor."""
        headers = [[name, info.dtype, list(info.shape)] for name, info in sorted(self.tensors.items())]
        # Not canonical_json: a config may hold infinities, which Python's JSON reads.
        text = json.dumps({"config": self.config, "tensors": headers}, sort_keys=True)
        return sha256_bytes(text.encode())

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of what the weights are: every tensor's name, dtype, shape and bytes, in name order.

        Independent of how the tensors are spread over files, and of an overlay. Reads the whole checkpoint,
        once.
        """
        return self.digest_of(self.tensor_digests(self.stored, stored=True))

    def tensor_digests(self, names: Iterable[str], stored: bool = False) -> dict[str, str]:
        """Hex SHA-256 of the bytes of tensors, which it reads; `stored`: of those in the folder."""
        seen = WitnessedFolder(self.stored if stored else self.tensors)
        # By name, the parts of a layer that is quantized as it's read stand together.
        for name in names if self.trained_as is None else sorted(names):
            for _ in seen.pieces(name):
                pass
        return seen.digests

    def digest_of(self, inner: Mapping[str, str]) -> str:
        """What `digest` is when every tensor's bytes have the SHA-256 that `inner` says; reads nothing."""
        digest = hashlib.sha256()
        for name, info in sorted(self.stored.items()):
            line = json.dumps([name, info.dtype, list(info.shape), inner[name]], ensure_ascii=False)
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def _stem(path: Path) -> str:
    """What the file or files of weights are called; a config.json may name them, for transformers."""
    if not (path / "config.json").is_file():
        return "model"
    named = read_json(path / "config.json", CheckpointError).get(NAMED_WEIGHTS)
    if named is None:
        return "model"
    for ending in (".safetensors.index.json", ".safetensors"):
        if isinstance(named, str) and named.endswith(ending) and safe_join(path, named, CheckpointError):
            return named.removesuffix(ending)
    raise CheckpointError(
        f"{path / 'config.json'}: {NAMED_WEIGHTS} is {named!r} where a safetensors file belongs"
    )


_BITSANDBYTES = {"load_in_4bit": frozenset({"nf4", "fp4"}), "load_in_8bit": frozenset({"int8"})}


def _check_agreement(path: Path, config: Mapping[str, Any], linears: Mapping[str, StoredLinear]) -> None:
    """Raise when config.json and the tensors say different things about how the weights are stored."""
    method = checks.method(config)
    stored = {linear.format: linear.module for linear in linears.values() if linear.format not in DTYPES}
    if method is not None and not stored and formats.rounds_weights(config):
        raise FormatError(
            f"{path / 'config.json'} says the weights are quantized with {method}, but no layer is stored in "
            f"a form of it that vera-edge knows; known formats: {', '.join(formats.FORMATS)}"
        )
    if method is None and stored:
        name, module = next(iter(stored.items()))
        raise CheckpointError(
            f"{module} in {path} is stored as {name}, but config.json has no quantization_config; one of the "
            "two belongs to another model"
        )
    if method != "bitsandbytes":
        return
    asked = checks.quantization(config)
    allowed = frozenset[str]().union(*(names for key, names in _BITSANDBYTES.items() if asked.get(key)))
    for name, module in stored.items():
        if name not in allowed:
            raise CheckpointError(
                f"{module} in {path} is stored as {name}, which the quantization_config of config.json rules "
                "out; one of the two belongs to another model"
            )
