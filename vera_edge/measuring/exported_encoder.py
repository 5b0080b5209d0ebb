"""The exported encoder as an artefact of drift: the device part's own session, asked by token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Int64
from vera_edge.device.runtime.encoder import CLASSES, SHIFTED, Encoded, Encoder
from vera_edge.device.runtime.graph import first_line
from vera_edge.device.runtime.opened import Opened, open_graph
from vera_edge.errors import BundleError, MismatchError
from vera_edge.storage.json_text import read_json
from vera_edge.tasks import task as tasks
from vera_edge.trained.text_settings import vocabulary_size

_ROWS = {tasks.TOKEN_CLASSES: ("logits",), tasks.SPANS: ("start_logits", "end_logits")}


class ExportedEncoder:
    """An exported folder that gives embeddings, classes or spans, with one of its adapters if it has some."""

    def __init__(self, folder: Path, adapter: str = "default") -> None:
        """Raises BundleError when the folder isn't a sound bundle of a text encoder."""
        config = read_json(folder / "config.json", BundleError)
        self.folder, self.gives, self.vocab_size = folder, tasks.of(config).gives, vocabulary_size(config)
        self._encoder: Encoder | None = None
        if self.gives in _ROWS:
            self._rows = _Rows(folder, adapter, _ROWS[self.gives])
            self.context = _positions(config)
        else:
            self._encoder = Encoder.open(folder, adapter, four_bit="kept")
            self.context = self._encoder.longest
            self.gives = tasks.CLASSES if self._encoder.gives == CLASSES else tasks.EMBEDDINGS

    def logits(self, tokens: Int64) -> Float32:
        """Raises MismatchError: an encoder has none over tokens."""
        raise MismatchError(f"{self.folder} gives no text, and the reference does: they're of two kinds")

    def outputs(self, tokens: Int64) -> Float32:
        """What it gives for one text's token ids (n,): a pooled embedding (d,), class logits (classes,),
        those of each token (n, classes), or where an answer starts and ends (2, n).
        """
        if self._encoder is None:
            return self._rows.outputs(tokens)
        found: Float32 = self._encoder.outputs([Encoded(tokens, np.zeros_like(tokens))])[0]
        return found


class _Rows(Opened):
    """A graph that gives several rows of logits for a text."""

    def __init__(self, folder: Path, adapter: str, names: tuple[str, ...]) -> None:
        super().__init__(*open_graph(folder, "encoder"))
        self._names = names
        self.swap(adapter)

    def outputs(self, tokens: Int64) -> Float32:
        row = tokens[None]
        feeds: dict[str, Any] = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "token_type_ids": np.zeros_like(row),
        }
        taken = {name: value for name, value in feeds.items() if name in self.graph.inputs}
        try:
            found = self.graph.session.run(list(self._names), {**taken, **self.vectors})
        except Exception as cause:  # onnxruntime's classes share no base but Exception
            raise BundleError(f"ONNX Runtime fails on {self.graph.path}: {first_line(cause)}") from None
        rows: Float32 = np.concatenate([value[0] if value.ndim == 3 else value for value in found])
        return rows.astype(np.float32, copy=False)


def _positions(config: dict[str, Any]) -> int | None:
    found, padding = config.get("max_position_embeddings"), config.get("pad_token_id")
    if type(found) is not int:
        return None
    return found - padding - 1 if config.get("model_type") in SHIFTED and type(padding) is int else found
