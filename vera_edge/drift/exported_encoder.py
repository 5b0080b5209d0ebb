"""The exported encoder as an artefact of drift: the device part's own session, asked by token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vera_edge.device.encoder import CLASSES, Encoded, Encoder
from vera_edge.device.pooling import Pooling
from vera_edge.errors import BundleError, MismatchError
from vera_edge.files import read_json

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class ExportedEncoder:
    """An exported folder that gives embeddings or classes, with one of its adapters where it has some."""

    def __init__(self, folder: Path, adapter: str = "default") -> None:
        """Raises BundleError when the folder isn't a sound bundle of a text encoder."""
        self._encoder = Encoder.open(folder, adapter)
        # As the reference's: however the folder says to pool, the mean over the tokens is what is compared.
        self._encoder.pooling = Pooling()
        size = read_json(folder / "config.json", BundleError).get("vocab_size")
        self.vocab_size = size if isinstance(size, int) else 0
        self.context = self._encoder.longest
        self.auto_class = (
            "AutoModelForSequenceClassification" if self._encoder.gives == CLASSES else "AutoModel"
        )

    def logits(self, tokens: Int64) -> Float32:
        """Raises MismatchError: an encoder has none over tokens."""
        raise MismatchError(
            f"{self._encoder.manifest.folder} gives no text, and the reference does: they're of two kinds"
        )

    def embed(self, tokens: Int64) -> Float32:
        """The embedding (d,) of one text's token ids, the mean of the last hidden states."""
        return self._outputs(tokens)

    def classify(self, tokens: Int64) -> Float32:
        """The class logits (classes,) of one text's token ids."""
        return self._outputs(tokens)

    def _outputs(self, tokens: Int64) -> Float32:
        found: Float32 = self._encoder.outputs([Encoded(tokens, np.zeros_like(tokens))])[0]
        return found
