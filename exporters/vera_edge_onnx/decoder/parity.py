"""Holds a decoder's float graph against the model, past every length that its config bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from vera_edge.arrays import Array, Float32, Int64
from vera_edge.device.runtime.decoding import ROPE_LENGTH
from vera_edge_onnx.decoder.rotary import all_parameters, context_length
from vera_edge_onnx.parity import Feeds, hold, run

_LONGEST = 400  # tokens that a sequence on the model itself has at most,
_LONGEST_OF_ALL = 1300  # and where no small copy of it can go further
_SHORT, _USUAL, _PAST = 5, 48, 20  # tokens: of a short sequence, of a usual one, and past a bound
_SEED = 20240311


class Model(Protocol):
    """The model in torch."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, tokens: Int64) -> Float32: ...


@dataclass(frozen=True)
class Lengths:
    """Sequences to compare, in tokens. bounds: the lengths that the config bounds, by what bounds them."""

    bounds: Mapping[str, int]
    longest: int

    @property
    def reached(self) -> bool:
        """Whether the longest sequence goes past every bound."""
        return all(self.longest > bound for bound in self.bounds.values())

    def __iter__(self) -> Iterator[int]:
        chosen = {_SHORT, self.longest}
        for bound in self.bounds.values():
            chosen |= {bound, bound + 1}
        yield from sorted(length for length in chosen if length <= self.longest)


def bounds_of(config: Any, windows: Sequence[int | None]) -> dict[str, int]:
    """What a text model's config bounds, in tokens, as far as its context reaches past it."""
    found = {"sliding_window": max(filter(None, windows), default=0)}
    for each in all_parameters(config):
        original = each.get("original_max_position_embeddings")
        if each.get("rope_type") == "dynamic":
            original = config.max_position_embeddings
        if original and each.get("rope_type") != "default":
            found["rope_original_length"] = max(int(original), found.get("rope_original_length", 0))
    return {name: bound for name, bound in found.items() if 0 < bound < context_length(config)}


def lengths_of(config: Any, bounds: Mapping[str, int], shrinkable: bool = True) -> Lengths:
    """The sequences that go past all bounds, or those that are short where a bound is too far to run.

    shrinkable: whether a small copy of the model can go further.
    """
    reach = max(bounds.values(), default=0) + _PAST
    longest = max(reach if reach <= (_LONGEST if shrinkable else _LONGEST_OF_ALL) else 0, _USUAL)
    return Lengths(bounds, min(longest, context_length(config)))


def compare(session: Any, model: Model, lengths: Lengths, vectors: Feeds = MappingProxyType({})) -> None:
    """Raise `Differs` unless graph and model give the same logits on each of the sequences.

    All at once, and the longest also in pieces with the cache: a chunk, several tokens, one by one.
    vectors: of the adapter that runs beside the base.
    """
    random = np.random.default_rng(_SEED)
    for length in lengths:
        tokens = random.integers(0, model.vocab_size, length)
        expected = model.logits(tokens)
        ways = [("logits", [length])]
        if length == lengths.longest:
            ways.append(("logits, computed in pieces with the cache,", _pieces(length)))
        for what, pieces in ways:
            found = logits(session, tokens, pieces, vectors)
            feeds = {**_feeds(session, tokens, 0, length, {}), **vectors}
            hold(expected, found, f"{what} of {length} tokens differ", feeds)


def _pieces(length: int) -> list[int]:
    """Half, then three tokens, then two one by one, then the rest."""
    pieces = [length // 2, 3, 1, 1]
    return [*pieces, length - sum(pieces)] if sum(pieces) < length else [length - 1, 1]


def logits(
    session: Any, tokens: Int64, pieces: Sequence[int], vectors: Feeds = MappingProxyType({})
) -> Float32:
    """A graph's logits (n, vocabulary) of one sequence (n,), fed in pieces of these sizes."""
    cache: dict[str, Array] = {}
    names = [output.name for output in session.get_outputs()]
    found, end = [], 0
    for size in pieces:
        start, end = end, end + size
        feeds = {**_feeds(session, tokens, start, end, cache), **vectors}
        outputs = dict(zip(names, run(session, names, feeds), strict=True))
        found.append(outputs["logits"][0])
        cache = {past: outputs[present] for past, present in _caches(session, names)}
    result: Float32 = np.concatenate(found)
    return result


def _feeds(session: Any, tokens: Int64, start: int, end: int, cache: Mapping[str, Array]) -> dict[str, Array]:
    feeds: dict[str, Array] = {
        "input_ids": tokens[None, start:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
    }
    inputs = {value.name: value for value in session.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in inputs}
    for name, value in inputs.items():
        if name not in feeds:
            shape = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
            feeds[name] = cache.get(name, np.zeros(shape, np.float32))
    if any(value.name == ROPE_LENGTH for value in session.get_overridable_initializers()):
        feeds[ROPE_LENGTH] = np.array([len(tokens)])
    return feeds


def _caches(session: Any, outputs: Sequence[str]) -> list[tuple[str, str]]:
    """(past input, present output) of everything that is handed on from run to run."""
    inputs = {value.name for value in session.get_inputs()}
    found = []
    for present in outputs:
        rest = present.removeprefix("present.")
        past = next((name for name in (f"past_key_values.{rest}", f"past.{rest}") if name in inputs), None)
        if rest != present and past is not None:
            found.append((past, present))
    return found
