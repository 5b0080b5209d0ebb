"""Keys and values of prompts that came before, so that what a prompt begins with alike is computed once.

Prompts are fed in chunks of `Decoder.prompt_chunk` tokens. What a chunk leaves in the KV cache depends on the
adapter and on all tokens up to its end, and on nothing else, so whole chunks are kept under the digest of
those: a prompt that finds its first chunks here gets the bits that it would compute. A chunk that isn't whole
is computed each time, since kernels round by how many tokens are fed at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from vera_edge.arrays import Array, Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.decoding import Steps
from vera_edge.errors import DataError

_ADAPTERS = 16  # whose digests are remembered


@dataclass(frozen=True)
class _Chunk:
    """Where a whole chunk of a prompt lies, and the digest of all that decides its keys and values."""

    start: int
    end: int
    digest: bytes


class PromptCache:
    """Chunks of prompts in at most `limit` bytes; those that were asked for least lately go. For all threads.

    Example:
        >>> cache = PromptCache(64 << 20)
        >>> cache.size, cache.limit
        (0, 67108864)
    """

    def __init__(self, limit: int) -> None:
        """Raises DataError for a limit below 0; 0 keeps nothing."""
        if limit < 0:
            raise DataError(f"prompt_cache is {limit} bytes; it must be 0, for none, or more")
        self.limit, self.size = limit, 0
        self._chunks: OrderedDict[bytes, list[Array]] = OrderedDict()
        self._adapters: OrderedDict[int, tuple[Vectors, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def prefill(self, steps: Steps, prompt: Tokens) -> tuple[int, Array]:
        """`steps.prefill` of a prompt (n,) that computes what isn't here: how much was, and its logits."""
        found = self.restore(steps, prompt)
        logits = steps.prefill(prompt[found:])
        self.keep(steps, prompt, found)
        return found, logits

    def restore(self, steps: Steps, prompt: Tokens) -> int:
        """Let `steps`, which hold nothing yet, hold the first tokens of a prompt: how many, never all."""
        found, used = 0, []
        for chunk in self._whole(steps, prompt):
            with self._lock:
                arrays = self._chunks.get(chunk.digest)
            if arrays is None or chunk.end == len(prompt):
                break
            for cache, array in zip(steps.cache, arrays, strict=True):
                cache[0, :, chunk.start : chunk.end] = array
            found = chunk.end
            used.append(chunk.digest)
        self._touch(used)
        steps.cut(found)
        return found

    def keep(self, steps: Steps, prompt: Tokens, found: int = 0) -> None:
        """Keep the whole chunks of a prompt that `steps` hold, but for the first `found` tokens."""
        chunks = list(self._whole(steps, prompt))
        for chunk in chunks:
            if chunk.start >= found:
                self._add(chunk.digest, [cache[0, :, chunk.start : chunk.end] for cache in steps.cache])
        self._touch([chunk.digest for chunk in chunks])

    def _touch(self, digests: list[bytes]) -> None:
        """Note that these of a prompt were asked for; the first stays longest, as none is of use without."""
        with self._lock:
            for digest in reversed(digests):
                if digest in self._chunks:
                    self._chunks.move_to_end(digest)

    def _add(self, digest: bytes, views: list[Array]) -> None:
        size = sum(view.nbytes for view in views)
        if size > self.limit:
            return
        with self._lock:
            if digest in self._chunks:
                return
            while self.size + size > self.limit:
                _, gone = self._chunks.popitem(last=False)
                self.size -= sum(array.nbytes for array in gone)
            self._chunks[digest] = [view.copy() for view in views]
            self.size += size

    def _whole(self, steps: Steps, prompt: Tokens) -> Iterator[_Chunk]:
        """The whole chunks of a prompt, the first first."""
        decoder = steps.decoder
        # Keys of a longer text are rotated by how long it is.
        if self.limit == 0 or (decoder.rope is not None and len(prompt) > decoder.rope.length):
            return
        digest, chunk = self._adapter(steps.vectors), decoder.prompt_chunk
        for start in range(0, len(prompt) - chunk + 1, chunk):
            tokens = np.ascontiguousarray(prompt[start : start + chunk], np.int64)
            digest = sha256(digest + tokens.tobytes()).digest()
            yield _Chunk(start, start + chunk, digest)

    def _adapter(self, vectors: Vectors) -> bytes:
        """A digest of an adapter's vectors, which nobody changes."""
        with self._lock:
            known = self._adapters.get(id(vectors))
            if known is not None:
                self._adapters.move_to_end(id(vectors))
                return known[1]
        found = sha256()
        for name, array in sorted(vectors.items()):
            found.update(f"{name} {array.shape} {array.dtype}\n".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        with self._lock:
            # Held with the vectors, so that no other's take their place in memory.
            self._adapters[id(vectors)] = vectors, found.digest()
            while len(self._adapters) > _ADAPTERS:
                self._adapters.popitem(last=False)
        return found.digest()
