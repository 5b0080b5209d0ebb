"""Rows of a batch that come and go while it runs: each its own text, adapter and length, in one KV cache.

The rows that run fill the first places of the cache; where one leaves, the last takes its place, so that a
step always reads one contiguous piece. None is padded to another's length: GroupQueryAttention reads and
appends each row at the row's own.

Kernels for one row, and for the odd one of several, add up in another order than those for two at once. With
an even number of rows each row's logits are the same whatever the others hold, so an idle row is fed along
where it takes one to get there. That is what kernels do, not what ONNX Runtime promises: a test holds it on
the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vera_edge.arrays import Array
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.batch import stacked
from vera_edge.device.runtime.decoding import Decoder, Steps


class Rows:
    """Up to `most` texts of up to `capacity` tokens each, stepping together. Not for several threads at once.

    varying: feed no idle row; quicker where an odd number runs, and logits depend on how many do.
    """

    def __init__(self, decoder: Decoder, capacity: int, most: int, varying: bool = False) -> None:
        self._decoder, self._varying = decoder, varying
        self._cache = decoder.cache(capacity, self._padded(most))
        self._vectors: list[Vectors] = []
        self._lengths: list[int] = []
        self._steps: Steps | None = None  # of the rows as they are; None once that changed

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, cache: Sequence[Array], length: int, vectors: Vectors) -> None:
        """Add a row behind the others: `length` tokens, whose keys and values `cache` (of one row) holds."""
        place = len(self)
        for whole, part in zip(self._cache, cache, strict=True):
            whole[place, :, :length] = part[0, :, :length]
        self._vectors.append(vectors)
        self._lengths.append(length)
        self._steps = None

    def leave(self, place: int) -> None:
        """Take a row out; the last one takes its place, as in `rows[place] = rows[-1]; del rows[-1]`."""
        last = len(self) - 1
        if place != last:
            length = self._lengths[last]
            for whole in self._cache:
                whole[place, :, :length] = whole[last, :, :length]
            self._vectors[place], self._lengths[place] = self._vectors[last], self._lengths[last]
        del self._vectors[last], self._lengths[last]
        self._steps = None

    def feed(self, tokens: Sequence[int]) -> Array:
        """Append one token to each row; logits (rows, vocab), overwritten by the next call.

        Raises BundleError when ONNX Runtime fails; the rows are then of no more use.
        """
        count = len(self)
        idle = self._padded(count) - count
        if self._steps is None:
            part = [whole[: count + idle] for whole in self._cache]
            vectors = stacked(self._decoder.graph, [*self._vectors, *self._vectors[:1] * idle])
            self._steps = Steps(self._decoder, part, vectors, [*self._lengths, *[0] * idle])
        logits = self._steps.feed(np.array([*tokens, *[0] * idle], np.int64)[:, None])
        self._steps.lengths[count:] = 0
        self._lengths = [int(length) for length in self._steps.lengths[:count]]
        return logits[:count, 0]

    def _padded(self, count: int) -> int:
        return count if self._varying else count + count % 2


def takes_rows(decoder: Decoder) -> bool:
    """Whether rows of one batch may run different adapters: a merged graph has none to differ by."""
    return not any(isinstance(port.shape[0], int) for port in decoder.graph.vectors.values())


def bytes_per_token(decoder: Decoder) -> int:
    """What one token takes in the caches of all layers."""
    heads, size = decoder.kv_shape
    return sum(heads * size * past.dtype.itemsize for past, _ in decoder.caches)
