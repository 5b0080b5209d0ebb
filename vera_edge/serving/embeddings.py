"""Texts to vectors, for encoders: requests one after the other, each in batches of its own."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.serving.fields import Fields, wrong

_MOST = 2048  # texts in a request, as OpenAI has it
_BATCH = 32
_IGNORED = frozenset({"user"})


@dataclass(frozen=True)
class EmbeddingRequest:
    """texts to embed. base64: give float32 bytes as base64, as the `openai` client asks, not as numbers.

    dimensions: what the client expects a vector to have; None: whatever the model gives.
    """

    model: str
    texts: list[str]
    base64: bool
    dimensions: int | None


def read(body: Mapping[str, Any]) -> EmbeddingRequest:
    """A request to /v1/embeddings. Raises RefusedRequestError (400) that names the member at fault."""
    fields = Fields(body)
    given = fields.raw("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not 0 < len(texts) <= _MOST:
        raise wrong("input", f"must be a text, or a list of 1 to {_MOST} texts")
    if not all(isinstance(text, str) for text in texts):
        raise wrong("input", "must hold texts; token ids of another model's tokenizer would mean nothing")
    if not all(texts):
        raise wrong("input", "holds an empty text")
    encoding = fields.raw("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise wrong("encoding_format", "must be float or base64")
    model, dimensions = fields.text("model"), fields.whole("dimensions", None, 1, 1 << 20)
    fields.end(_IGNORED)
    return EmbeddingRequest(model, texts, encoding == "base64", dimensions)


def answer(
    encoder: Encoder, asked: EmbeddingRequest, vectors: Vectors, wanted: Callable[[], bool]
) -> dict[str, Any] | None:
    """OpenAI's answer; None once it's no longer `wanted`, which is asked between batches."""
    encoded = encoder.encode(asked.texts)
    parts = []
    for start in range(0, len(encoded), _BATCH):
        if not wanted():
            return None
        parts.append(encoder.outputs(encoded[start : start + _BATCH], _BATCH, vectors))
    values = np.concatenate(parts)
    if asked.dimensions is not None and asked.dimensions != values.shape[1]:
        raise wrong("dimensions", f"must be {values.shape[1]}, which is what this model gives")
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, asked.base64)}
        for index, vector in enumerate(values)
    ]
    count = sum(len(one.ids) for one in encoded)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _written(vector: Float32, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    # The shortest decimal that reads back as the same float32, as in `vera-edge run`.
    return [float(str(value)) for value in vector]
