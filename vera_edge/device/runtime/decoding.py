"""One step of a decoder: tokens in, logits out, and a KV cache that is never copied.

The cache is allocated once for the longest sequence; each layer's present output is bound to the very buffer
of its past input, which GroupQueryAttention recognises and appends to in place. Pages that no token
has reached yet cost no memory, since the system maps them when they are first written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Array, Tokens
from vera_edge.device.runtime import last_logits, pages
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.graph import Graph, GraphPorts, Port, bind, first_line
from vera_edge.errors import BundleError
from vera_edge.storage.json_text import read_json

# Logits of one chunk of a text: bounds memory whatever the vocabulary.
_CHUNK_BYTES = 24 << 20
_MAX_CHUNK = 128  # tokens; more of them leave the processor's caches
# The graph input that tells how long a sequence is that is fed in pieces, where its rotary embedding asks.
ROPE_LENGTH = "rope_sequence_length"
# In the graph's metadata: how its rotary embedding depends on that length, and past how many tokens.
ROPE_KIND, ROPE_SWITCH = "vera_edge.rope", "vera_edge.rope_switch"


@dataclass(frozen=True)
class RopeSwitch:
    """A rotary embedding that rotates sequences of more than `length` tokens otherwise, all their keys.

    recompute: whether a text that grows past it is fed anew, as transformers does it for longrope. With
    dynamic scaling it keeps its keys, and only what is fed afterwards is rotated by the new length.
    """

    length: int
    recompute: bool

    @classmethod
    def of(cls, graph: GraphPorts) -> RopeSwitch | None:
        """What the graph says; None when the length changes nothing. Raises BundleError when it's garbled."""
        if ROPE_LENGTH not in graph.options:
            return None
        kind, length = (graph.metadata.get(key, "") for key in (ROPE_KIND, ROPE_SWITCH))
        if kind not in ("longrope", "dynamic") or not length.isdecimal():
            raise BundleError(
                f"{graph.path} takes {ROPE_LENGTH} and doesn't say why; export the bundle again"
            )
        return cls(int(length), kind == "longrope")


@dataclass(frozen=True)
class DecoderFacts:
    """What a decoder's folder and graph say: sizes, the longest context, the tokens that end a text.

    rope: how the length of a sequence changes its rotary embedding; None where it doesn't. cuts_logits:
    whether the graph can leave out all logits but the last.
    """

    vocab_size: int
    context: int
    ends: frozenset[int]
    caches: tuple[tuple[Port, Port], ...]  # (past input, present output), keys and values of every layer
    kv_shape: tuple[int, int]  # (heads, head size)
    rope: RopeSwitch | None
    cuts_logits: bool

    @staticmethod
    def read(folder: Path, graph: GraphPorts) -> DecoderFacts:
        """Read genai_config.json and match it with the graph. Raises BundleError when they disagree."""
        path = folder / "genai_config.json"
        config = read_json(path, BundleError)
        try:
            model, search = config["model"], config["search"]
            inner = model["decoder"]
            heads, size = _count(inner, "num_key_value_heads"), _count(inner, "head_size")
            context, vocab = _count(model, "context_length"), _count(model, "vocab_size")
            layers = _count(inner, "num_hidden_layers")
            ends = model["eos_token_id"]
            shared = search.get("past_present_share_buffer") is True
            if not shared:
                raise BundleError(
                    f"{path} doesn't let past and present share a buffer; export the bundle again"
                )
            end_ids = frozenset(ends if isinstance(ends, list) else [ends])
            if not all(type(token) is int for token in end_ids):
                raise ValueError("eos_token_id")
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise BundleError(f"{path} lacks or garbles {cause}; export the bundle again") from None
        ports, rope = _cache_ports(graph, layers), RopeSwitch.of(graph)
        cuts = last_logits.FROM in graph.options
        facts = DecoderFacts(vocab, context, end_ids, ports, (heads, size), rope, cuts)
        held = {side for past, _ in ports for side in zip(past.shape[1::2], (heads, size), strict=True)}
        if wrong := [side for side in held if isinstance(side[0], int) and side[0] != side[1]]:
            raise BundleError(f"{graph.path} keeps {wrong[0][0]} where {path.name} says {wrong[0][1]}")
        logits = graph.outputs.get("logits")
        if logits is None or logits.shape[-1] != vocab:
            raise BundleError(f"{graph.path} has no logits over the {vocab} tokens that {path.name} promises")
        return facts

    @property
    def chunk(self) -> int:
        """Tokens of a text that are fed at once where each one's logits are asked for."""
        return max(1, min(_MAX_CHUNK, _CHUNK_BYTES // (4 * self.vocab_size)))

    @property
    def prompt_chunk(self) -> int:
        """Tokens of a prompt that are fed at once; `chunk` where the graph gives the logits of all."""
        return _MAX_CHUNK if self.cuts_logits else self.chunk

    def cache(self, capacity: int, rows: int = 1) -> list[Array]:
        """Empty caches for `rows` sequences of `capacity` tokens at most: (rows, heads, capacity, size)."""
        heads, size = self.kv_shape
        return [pages.zeros((rows, heads, capacity, size), past.dtype) for past, _ in self.caches]


@dataclass(frozen=True)
class Decoder(DecoderFacts):
    """The same, with the graph open. further: more outputs that are the buffer of a cache, for each."""

    graph: Graph
    further: tuple[tuple[Port, ...], ...] = ()

    @classmethod
    def open(cls, folder: Path, graph: Graph) -> Decoder:
        """Raises BundleError as `read`."""
        return cls(**vars(cls.read(folder, graph)), graph=graph)


def _count(facts: Mapping[str, Any], key: str) -> int:
    """A whole number of 1 or more; raises ValueError that names it."""
    value = facts[key]
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(key)
    return value


def _cache_ports(graph: GraphPorts, layers: int) -> tuple[tuple[Port, Port], ...]:
    pairs = []
    for layer in range(layers):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            if past not in graph.inputs or present not in graph.outputs:
                raise BundleError(f"{graph.path} has no {past} or no {present}; export the bundle again")
            pairs.append((graph.inputs[past], graph.outputs[present]))
    known = {"input_ids", "attention_mask", "position_ids"} | {past.name for past, _ in pairs}
    strange = sorted(graph.inputs.keys() - known)
    if "input_ids" not in graph.inputs or strange:
        what = f"takes {strange[0]}" if strange else "takes no input_ids"
        raise BundleError(f"{graph.path} isn't a decoder that vera-edge can feed: it {what}")
    return tuple(pairs)


class Steps:
    """Feeds tokens to a decoder and keeps its cache: one row, or several rows a token at a time.

    Not for several threads at once; make one for each sequence or batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Sequence[Array],
        vectors: Vectors,
        lengths: Sequence[int] | None = None,
        whole: int = 0,
    ) -> None:
        """`cache` is from `Decoder.cache` and holds `lengths` tokens per row; `vectors` of the adapter.

        whole: how long the sequence is known to become, for rotary embeddings that depend on it.
        """
        self._decoder, self._graph = decoder, decoder.graph
        self._cache, self._vectors = list(cache), vectors  # alive as long as they are bound
        rows, _, self.capacity, _ = cache[0].shape
        self.lengths = np.array(lengths if lengths is not None else [0] * rows, np.int64)
        self._mask, self._whole = np.ones((1, self.capacity), np.int64), whole
        self._binding = self._graph.binding()
        self._bound: dict[str, Array] = {}
        for (past, present), array in zip(decoder.caches, self._cache, strict=True):
            bind(self._binding, past, array)
            bind(self._binding, present, array, output=True)
        for ports, array in zip(decoder.further, self._cache, strict=False):
            for port in ports:
                bind(self._binding, port, array, output=True)
        self._run = self._graph.runner(self._binding, self._vectors)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def decoder(self) -> Decoder:
        """Whose steps they are."""
        return self._decoder

    @property
    def vectors(self) -> Vectors:
        """The adapter's vectors, as they were given."""
        return self._vectors

    @property
    def cache(self) -> Sequence[Array]:
        """Keys and values of every layer (rows, heads, capacity, size), which `feed` writes."""
        return self._cache

    def beside(self, decoder: Decoder) -> Steps:
        """Steps of another graph of the same decoder over the same cache; each has lengths of its own."""
        return Steps(decoder, self._cache, self._vectors, self.lengths.tolist(), self._whole)

    def cut(self, length: int) -> None:
        """Let the single row hold its first `length` tokens, which some Steps over its cache have fed."""
        self.lengths[:] = length

    def feed(self, tokens: Tokens, last: bool = False) -> Array:
        """Append `tokens` (rows, n) and return logits (rows, n, vocab) in the graph's dtype.

        last: of the last token alone, (rows, 1, vocab). The array is overwritten by the next call. With
        several rows n must be 1. Raises BundleError when ONNX Runtime fails.
        """
        rows, count = tokens.shape
        assert rows == self.rows and (rows == 1 or count == 1)
        starts = self.lengths.copy()
        self.lengths += count
        assert self.lengths.max() <= self.capacity
        self._set("input_ids", tokens)
        self._bind_input("attention_mask", self._attention_mask())
        if "position_ids" in self._graph.inputs:
            self._set("position_ids", starts[:, None] + np.arange(count))
        if self._decoder.rope is not None:
            self._set(ROPE_LENGTH, np.array([max(self._whole, int(self.lengths.max()))]))
        alone = last and self._decoder.cuts_logits
        if self._decoder.cuts_logits:
            self._set(last_logits.FROM, np.array([-1 if alone else 0]))
        logits = self._output(1 if alone else count)
        try:
            self._run()
        except Exception as cause:  # onnxruntime's classes share no base but Exception
            raise BundleError(f"ONNX Runtime fails on {self._graph.path}: {first_line(cause)}") from None
        return logits[:, -1:] if last else logits

    def prefill(self, tokens: Tokens) -> Array:
        """Feed a prompt (n,) to the single row, chunk by chunk, and return its last logits (vocab,)."""
        self._whole = max(self._whole, int(self.lengths.max()) + len(tokens))
        for logits in self.pieces(tokens):
            last = logits
        return last

    def pieces(self, tokens: Tokens) -> Iterator[Array]:
        """Feed a prompt (n,) to the single row; yields the logits (vocab,) behind each of its chunks."""
        size = self._decoder.prompt_chunk
        for start in range(0, len(tokens), size):
            yield self.feed(tokens[None, start : start + size], last=True)[0, 0]

    def append(self, text: Tokens) -> Array:
        """Feed the last token of `text` (n,), whose others the single row holds; its logits (vocab,).

        All of it is fed anew where the rotary embedding now rotates every key otherwise.
        """
        rope, before = self._decoder.rope, max(self._whole, len(text) - 1)
        if rope is not None and rope.recompute and before <= rope.length < len(text):
            self.lengths[:] = 0
            return self.prefill(text)
        return self.feed(text[None, -1:])[0, 0]

    def chunks(self, tokens: Tokens) -> Iterator[tuple[int, Array]]:
        """Feed a text (n,) to the single row; yields (start, logits (m, vocab)), valid until the next."""
        for start in range(0, len(tokens), self._decoder.chunk):
            yield start, self.feed(tokens[None, start : start + self._decoder.chunk])[0]

    def _attention_mask(self) -> Array:
        total = int(self.lengths.max())
        if self.rows == 1:
            return self._mask[:, :total]
        return (np.arange(total) < self.lengths[:, None]).astype(np.int64)

    def _set(self, name: str, values: Array) -> None:
        """Copy small inputs into a bound buffer, so that a step of the same shape binds nothing anew."""
        bound = self._bound.get(name)
        if bound is None or bound.shape != values.shape:
            self._bind_input(name, np.array(values, self._port(name).dtype, order="C"))
        else:
            bound[...] = values

    def _port(self, name: str) -> Port:
        return self._graph.options[name] if name in self._graph.options else self._graph.inputs[name]

    def _bind_input(self, name: str, array: Array) -> None:
        if name in self._graph.inputs or name in self._graph.options:
            self._bound[name] = array
            bind(self._binding, self._port(name), array)

    def _output(self, count: int) -> Array:
        bound = self._bound.get("logits")
        if bound is None or bound.shape[1] != count:
            port = self._graph.outputs["logits"]
            bound = np.empty((self.rows, count, self._decoder.vocab_size), port.dtype)
            self._bound["logits"] = bound
            bind(self._binding, port, bound, output=True)
        return bound
