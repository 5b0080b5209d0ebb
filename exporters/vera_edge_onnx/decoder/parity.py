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
from vera_edge_onnx.parity import hold
from vera_edge_onnx.running import GraphSignature, Running
from vera_edge_onnx.sessions import Feeds

_LONGEST = 400  # tokens that a sequence on the model itself has at most,
_LONGEST_OF_ALL = 1300  # and where no small copy of it can go further
_SHORT, _USUAL, _PAST = 5, 48, 20  # tokens: of a short sequence, of a usual one, and past a bound
_SEED = 20240311


class Model(Protocol):
    """The model in torch."""

    @property
    def vocab_size(self) -> int: ...

    def logits_of(self, windows: Sequence[Int64]) -> Iterator[Float32]:
        """Logits (n, vocabulary) of each sequence (n,), one after the other."""


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


def compare(running: Running, model: Model, lengths: Lengths, vectors: Feeds = MappingProxyType({})) -> None:
    """Raise `Differs` unless graph and model give the same logits on each of the sequences.

    All at once, and the longest also in pieces with the cache: a chunk, several tokens, one by one.
    vectors: of the adapter that runs beside the base.
    """
    random = np.random.default_rng(_SEED)
    windows = [random.integers(0, model.vocab_size, length) for length in lengths]
    ways = [(row, "logits", [len(tokens)]) for row, tokens in enumerate(windows)]
    ways.append((len(windows) - 1, "logits, computed in pieces with the cache,", _pieces(lengths.longest)))
    chains = [_chain(running.signature, windows[row], pieces, vectors) for row, _, pieces in ways]
    results = running.run_chains(chains, _caches(running.signature), ["logits"])
    expected = model.logits_of(windows)
    row, answer = -1, np.empty(0, np.float32)
    for (at, what, _), found in zip(ways, results, strict=True):
        if at > row:
            answer, row = next(expected), at
        feeds = {**fed(running.signature, windows[at], 0, len(windows[at])), **vectors}
        logits = np.concatenate([one["logits"][0] for one in found])
        hold(answer, logits, f"{what} of {len(windows[at])} tokens differ", feeds)


def _pieces(length: int) -> list[int]:
    """Half, then three tokens, then two one by one, then the rest."""
    pieces = [length // 2, 3, 1, 1]
    return [*pieces, length - sum(pieces)] if sum(pieces) < length else [length - 1, 1]


def _chain(
    signature: GraphSignature, tokens: Int64, pieces: Sequence[int], vectors: Feeds
) -> list[dict[str, Array]]:
    """What each run is fed of one sequence (n,), in pieces of these sizes."""
    ends = np.cumsum(pieces).tolist()
    starts = [0, *ends[:-1]]
    return [
        {**fed(signature, tokens, start, end), **vectors} for start, end in zip(starts, ends, strict=True)
    ]


def fed(signature: GraphSignature, tokens: Int64, start: int, end: int) -> dict[str, Array]:
    """The inputs of one run on tokens `start` to `end` of a sequence (n,), the cache empty."""
    feeds: dict[str, Array] = {
        "input_ids": tokens[None, start:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
    }
    feeds = {name: array for name, array in feeds.items() if name in signature.inputs}
    for name, shape in signature.inputs.items():
        if name not in feeds:
            sizes = [1, *(size if isinstance(size, int) else 0 for size in shape[1:])]
            feeds[name] = np.zeros(sizes, np.float32)
    if ROPE_LENGTH in signature.overridable:
        feeds[ROPE_LENGTH] = np.array([len(tokens)])
    return feeds


def _caches(signature: GraphSignature) -> dict[str, str]:
    """By past input, the present output of everything that is handed on from run to run."""
    found = {}
    for present in signature.outputs:
        rest = present.removeprefix("present.")
        names = (f"past_key_values.{rest}", f"past.{rest}")
        past = next((name for name in names if name in signature.inputs), None)
        if rest != present and past is not None:
            found[past] = present
    return found
