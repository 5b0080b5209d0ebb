"""Which tensors of a model are one (an output head and its embedding), and whether a merge leaves them so.

A checkpoint may store both of a tied pair, one, or both with different values; transformers 5 ties what is
equal, transformers 4 and other loaders tie whatever config.json says is tied. So where a merge leaves two
values, config.json must say that nothing is tied, and what isn't stored since it was tied must be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vera_edge import formats
from vera_edge.adapters.adapter import Adapter, LayerChange
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats import dense, row_chunks
from vera_edge.plans.plan import DENSE, Plan
from vera_edge.storage.tensors import FLOATS, RawTensor
from vera_edge.tasks import task as tasks
from vera_edge.trained.alignment import empty_model

_HEAD = "lm_head.weight"
_HEADS = ("lm_head", "decoder", "embed_out", "vocab_projector", "proj_out", "generator_lm_head", "output")
# To these tie_word_embeddings says how the decoder's outputs are scaled, too.
_SCALED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop"})


def pairs(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    replaced: Mapping[str, RawTensor],
) -> tuple[tuple[str, str], ...]:
    """Tied tensors, (head, embedding), by the names the checkpoint has or would have for them.

    Empty where nothing is tied, and where the adapters touch neither half of a pair that is stored once.
    """
    if checkpoint.config.get("tie_word_embeddings") is False:
        return ()
    adapted = [module for adapter, _ in adapters for module in adapter.vectors]
    owners = [name.rpartition(".")[0] for name in replaced]
    if not (
        any(_is_head(module) for module in (*checkpoint.linears, *adapted, *owners))
        or any(dense.is_embedding(module) for module in owners)
    ):
        return ()
    model = empty_model(checkpoint)
    if model is None:
        return tuple(_by_name(checkpoint, replaced))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    known = {*checkpoint.tensors, *replaced, *(f"{module}.weight" for module in checkpoint.linears)}
    return tuple((_stored_name(head, known), _stored_name(source, known)) for head, source in tied.items())


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] in _HEADS


def _by_name(checkpoint: Checkpoint, replaced: Mapping[str, RawTensor]) -> Iterator[tuple[str, str]]:
    """lm_head and the embedding of its size, in a model that transformers doesn't know."""
    if not tasks.architecture(checkpoint.config).endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):
        return
    vocabulary = checkpoint.config.get("vocab_size")
    for name, info in checkpoint.tensors.items():
        if dense.is_embedding(name.removesuffix(".weight")) and info.shape[:1] == (vocabulary,):
            yield _HEAD, name
            return


def _stored_name(live: str, known: set[str]) -> str:
    """The checkpoint's name for a tensor of the model, which may lack the model's prefix; else the same."""
    if live in known:
        return live
    alike = [name for name in known if live.endswith(f".{name}") or name.endswith(f".{live}")]
    return alike[0] if len(alike) == 1 else live


def scales_by_tying(config: Mapping[str, Any]) -> bool:
    """Whether tie_word_embeddings says more to this model than what is tied."""
    return config.get("model_type") in _SCALED


def _changes(change: LayerChange) -> bool:
    """Whether an adapter changes a layer at all."""
    if isinstance(change, LambdaVectors) and not change.lambda_d.any():
        return False
    return not change.is_zero


class Values:
    """What a merge leaves in tied tensors: the base's value, the adapter's own, or the base's and a delta."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
        replaced: Mapping[str, RawTensor],
    ) -> None:
        self._checkpoint, self._replaced = checkpoint, replaced
        self._quantized = {step.module for step in plan.steps if step.result not in DENSE}
        self._adapted = {
            module
            for adapter, weight in adapters
            for module, change in adapter.vectors.items()
            if weight and _changes(change)
        }

    def is_stored(self, name: str) -> bool:
        """Whether the base has a tensor, or a quantized weight, of this name."""
        return name in self._checkpoint.tensors or name.removesuffix(".weight") in self._checkpoint.linears

    def differ(self, one: str, other: str) -> bool:
        """Whether two tied tensors end with different values; one that isn't stored begins as the other."""
        for name in (one, other):
            module = name.removesuffix(".weight")
            if name not in self._replaced and module in self._adapted | self._quantized:
                return True
        new = [self._replaced.get(name) for name in (one, other)]
        if new[0] is not None and new[1] is not None:
            return not _same(new[0], new[1])
        stored = [name for name in (one, other) if self.is_stored(name)]
        changed = new[0] or new[1]
        if changed is not None:
            left = other if new[0] is not None else one
            base = left if self.is_stored(left) else stored[0] if stored else None
            return base is None or not self._is(base, changed)
        return len(stored) == 2 and not self._same_in_base(one, other)

    def _is(self, name: str, value: RawTensor) -> bool:
        """Whether the base's tensor has this value."""
        info = self._checkpoint.tensors.get(name)
        if info is None or info.shape != value.shape or info.dtype not in FLOATS:
            return False
        return _same(self._checkpoint.tensors.read(name), value)

    def _same_in_base(self, one: str, other: str) -> bool:
        tensors = self._checkpoint.tensors
        infos = [tensors.get(name) for name in (one, other)]
        if infos[0] is not None and infos[1] is not None and infos[0].dtype == infos[1].dtype:
            pieces = zip(tensors.pieces(one), tensors.pieces(other), strict=False)
            return infos[0].shape == infos[1].shape and all(np.array_equal(a, b) for a, b in pieces)
        head, source = sorted(
            (one, other), key=lambda name: name.removesuffix(".weight") not in self._linears
        )
        if head.removesuffix(".weight") not in self._linears or source not in tensors:
            return False
        weight = formats.load(tensors, self._linears[head.removesuffix(".weight")])
        embedding = tensors.read(source)
        if weight.shape != embedding.shape or embedding.dtype not in FLOATS:
            return False
        values = embedding.float32()
        return all(
            np.array_equal(weight.rows(start, stop), values[start:stop])
            for start, stop in row_chunks(weight.shape)
        )

    @property
    def _linears(self) -> Mapping[str, Any]:
        return self._checkpoint.linears


def _same(one: RawTensor, other: RawTensor) -> bool:
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS:
        return False
    return np.array_equal(one.float32(), other.float32())
