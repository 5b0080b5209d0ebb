"""An adapter of any method as read from its folder: what was trained for each layer, and what besides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vera_edge.arrays import Float32
from vera_edge.storage.tensors import RawTensor

if TYPE_CHECKING:
    from vera_edge.adapters.embeddings import EmbeddingChange

VERA, LORA = "VERA", "LORA"  # as PEFT calls them


class LayerChange(ABC):
    """What a method trained for one linear layer: float32 arrays, and what they say of the layer."""

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Float32]:
        """The trained values, by the ends of the names that PEFT saves them under."""

    @property
    def trained(self) -> Mapping[str, Float32]:
        """Those of them that training changes: not what was drawn or chosen when it began."""
        return self.arrays

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """Whether the layer stays exactly what it was."""

    @property
    def adds(self) -> bool:
        """Whether it adds to the weight what the weight has no part in; else it makes another one of it."""
        return True

    @property
    def out_features(self) -> int | None:
        """The layer's outputs, None where the values don't tell."""
        return None

    @property
    def in_features(self) -> int | None:
        """The layer's inputs, None where the values don't tell."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, read and checked.

    vectors: what was trained for each linear layer, named as in the base checkpoint
        ("model.layers.0.self_attn.q_proj").
    rank: the method's rank, the largest where layers differ; 0 where it has none. seed: VeRA's alone.
    saved: VeRA's A (rank, in_max) and B (out_max, rank) when the folder holds them.
    biases: trained biases by module, float32, which replace the base's. computed: those of them that were
        computed from the base's and what the method trained, so that PEFT's own layers give them too.
    modules_to_save: tensors that replace the base's, by the name they have there.
    shared: what all layers share, by the end of PEFT's name.
    embeddings: what was trained for tables of embeddings, by module. made: those of modules_to_save that were
        computed from them and the base's.
    digest: hex SHA-256 of the tensors and of the settings that change what the adapter computes (VeRA: rank,
        seed, bias and PEFT version). Names and paths aren't among them.
    as_trained: the same under PEFT's names, where the base at hand has others (see `alignment`).
    notes: sentences a person should read about how it was saved.
    method: PEFT's name of the method, its `peft_type`.
    """

    path: Path
    name: str
    base_name: str | None
    rank: int
    seed: int
    vectors: Mapping[str, LayerChange]
    saved: tuple[Float32, Float32] | None
    biases: Mapping[str, Float32]
    modules_to_save: Mapping[str, RawTensor]
    config: Mapping[str, Any]
    peft_version: str | None
    digest: str
    as_trained: Adapter | None = None
    notes: tuple[str, ...] = ()
    method: str = VERA
    computed: frozenset[str] = frozenset()
    shared: Mapping[str, RawTensor] | None = None
    embeddings: Mapping[str, EmbeddingChange] = field(default_factory=dict)
    made: frozenset[str] = frozenset()

    @property
    def is_vera(self) -> bool:
        """Whether it is a VeRA adapter, which has projections."""
        return self.method == VERA

    @property
    def adds(self) -> bool:
        """Whether it only adds to weights, so that it can be weighted and summed with others."""
        return all(change.adds for change in self.vectors.values())


class WeightedAdapter(NamedTuple):
    """An adapter and the weight that scales its delta."""

    adapter: Adapter
    weight: float
