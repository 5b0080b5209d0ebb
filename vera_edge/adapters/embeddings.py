"""What LoRA trains for a table of embeddings: a pair beside all of it, or some of its rows anew.

Neither is a linear layer's change: on a table (tokens, width) the pair is `W + scale (B A)^T`, with A
(r, tokens) and B (width, r), `Embedding` of peft/tuners/lora/layer.py; DoRA brings its columns to the lengths
that were trained (`DoraEmbeddingLayer` of peft/tuners/lora/dora.py). `trainable_token_indices` keep whole
rows (`TrainableTokensLayer` of peft/tuners/trainable_tokens/layer.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vera_edge.adapters.folder import AdapterFolder
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, MismatchError

A, B, ROWS = "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"
_HOLDER = ".token_adapter"  # the part of PEFT's names between a table and its rows
_INDICES = "trainable_token_indices"


class EmbeddingChange(ABC):
    """What was trained for one table of embeddings."""

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Float32]:
        """The trained values, by the ends of the names that PEFT saves them under."""

    @property
    @abstractmethod
    def setting(self) -> object:
        """What the config says that decides what the values compute, as JSON has it."""

    @abstractmethod
    def whole(self, table: Float32, name: str) -> Float32:
        """The table (tokens, width), float32, as it was trained, from the base's.

        name: what an error calls it. Raises MismatchError where the two don't fit.
        """


@dataclass(frozen=True, eq=False)
class EmbeddingPair(EmbeddingChange):
    """`a` (r, tokens), `b` (width, r), float32, the scale of their product; magnitude: DoRA's (width,)."""

    a: Float32
    b: Float32
    scale: float
    magnitude: Float32 | None = None

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """A, B, and a magnitude where there is one."""
        found = {A: self.a, B: self.b, MAGNITUDE: self.magnitude}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def setting(self) -> object:
        """The scale."""
        return self.scale

    def whole(self, table: Float32, name: str) -> Float32:
        """As `EmbeddingChange` has it."""
        shape = (self.a.shape[1], self.b.shape[0])
        if table.shape != shape:
            raise MismatchError(
                f"{name} was trained with shape {list(shape)}, here it has {list(table.shape)}"
            )
        found: Float32 = table + np.float32(self.scale) * (self.a.T @ self.b.T)
        if self.magnitude is not None:
            found *= self.magnitude / np.linalg.norm(found, axis=0)
        return found


@dataclass(frozen=True, eq=False)
class TokenRows(EmbeddingChange):
    """`rows` (n, width), float32, of the tokens `indices`, in the place of the base's."""

    rows: Float32
    indices: tuple[int, ...]

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """The rows."""
        return {ROWS: self.rows}

    @property
    def setting(self) -> object:
        """The tokens."""
        return list(self.indices)

    def whole(self, table: Float32, name: str) -> Float32:
        """As `EmbeddingChange` has it."""
        if self.rows.shape[1] != table.shape[1] or max(self.indices) >= len(table):
            raise MismatchError(
                f"{name} was trained with a token {max(self.indices)} of width {self.rows.shape[1]}, and "
                f"here its shape is {list(table.shape)}"
            )
        found = table.copy()
        found[list(self.indices)] = self.rows
        return found


def module_of(module: str) -> str:
    """The table that PEFT's name of a holder of rows belongs to."""
    return module.removesuffix(_HOLDER)


def rows_of(folder: AdapterFolder, module: str, rows: Float32) -> TokenRows:
    """The rows trained for `module`, of the tokens that the config names. Raises AdapterError for others."""
    given = folder.config.get(_INDICES)
    if isinstance(given, Mapping):
        named = [value for key, value in given.items() if f".{module}".endswith(f".{key}")]
        given = named[0] if len(named) == 1 else None
    if not isinstance(given, list) or any(type(index) is not int or index < 0 for index in given):
        raise folder.refuse(f"{_INDICES} doesn't list the tokens of {module}, whose rows the adapter holds")
    if len(given) != len(rows) or len(set(given)) != len(given):
        raise folder.refuse(
            f"{_INDICES} lists {len(given)} tokens of {module}, and it holds {len(rows)} rows"
        )
    return TokenRows(rows, tuple(given))


def pair_of(
    folder: AdapterFolder, module: str, parts: Mapping[str, Float32], rank: int, scale: float
) -> EmbeddingPair:
    """The pair trained for `module`. Raises AdapterError where a half is missing or of another rank."""
    if missing := {A, B} - parts.keys():
        raise AdapterError(f"{folder.path} holds no {min(missing)} for {module}; {A} and {B} go together")
    a, b, magnitude = parts[A], parts[B], parts.get(MAGNITUDE)
    if len(a) != rank or b.shape[1] != rank:
        raise AdapterError(
            f"the matrices of {module} in {folder.path} have shapes {list(a.shape)} and {list(b.shape)}, and "
            f"its config gives them rank {rank}"
        )
    if (magnitude is not None) != bool(folder.config.get("use_dora")) or (
        magnitude is not None and magnitude.size != len(b)
    ):
        raise AdapterError(
            f"{folder.path} has no magnitudes of {module} that fit use_dora {folder.config.get('use_dora')!r}"
        )
    return EmbeddingPair(a, b, scale, magnitude)


def check_all_there(folder: AdapterFolder, found: Mapping[str, EmbeddingChange]) -> None:
    """Raise AdapterError where the config says that tokens were trained and the folder holds none."""
    if folder.config.get(_INDICES) and not any(isinstance(change, TokenRows) for change in found.values()):
        raise folder.refuse(f"{_INDICES} is set, and the folder holds no {ROWS}; save the adapter again")
