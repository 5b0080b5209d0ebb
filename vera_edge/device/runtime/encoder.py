"""An encoder's bundle opened on the device: texts to embeddings, or to the probabilities of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Int64
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import answers
from vera_edge.device.runtime import pooling
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.four_bit_graph import FourBit
from vera_edge.device.runtime.graph import Graph, first_line
from vera_edge.device.runtime.opened import AdapterChoice, Opened, open_graph
from vera_edge.device.runtime.pooling import Pooling
from vera_edge.device.runtime.pooling_layers import unit
from vera_edge.errors import BundleError, DataError
from vera_edge.formats import checks
from vera_edge.storage.json_text import read_json

EMBEDDINGS, CLASSES = "last_hidden_state", "logits"  # what the graph's output is called
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_TOKENS = 2048  # fed at once, padding included: bounds memory
_ENDLESS = 1 << 31  # neither a number of tokens nor an id
# Their positions begin behind the padding's id.
SHIFTED = {"roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "longformer", "ibert"}


@dataclass(frozen=True)
class Encoded:
    """A text, or a pair of texts, as the model takes it: token ids (n,), and of which text each is (n,)."""

    ids: Int64
    types: Int64


class Encoder(Opened):
    """An open encoder bundle. Several threads may use it at once; `swap` changes what begins afterwards.

    gives: EMBEDDINGS or CLASSES. labels: the classes' names, in the order of the probabilities. answers: what
    it gives more closely, EMBEDDINGS or one of `device.answers`. longest: the tokens of a text that are read,
    the rest is cut off.

    Example:
        >>> encoder = vera_edge.Encoder.open("embedder")
        >>> encoder.embed(["a text", "another"]).shape[0]
        2
    """

    def __init__(self, manifest: Manifest, graph: Graph, text: BundleText) -> None:
        """Raises BundleError when the graph or the folder isn't that of a text encoder."""
        super().__init__(manifest, graph)
        self.gives = _output(graph)
        size = graph.outputs[self.gives].shape[-1]
        hidden = size if isinstance(size, int) and self.gives == EMBEDDINGS else None
        self.text, self.pooling = text, pooling.read(manifest.folder, hidden)
        config = read_json(manifest.folder / "config.json", BundleError)
        checks.named(config, manifest.folder / "config.json", BundleError)
        self.labels = _labels(config, size) if self.gives == CLASSES else ()
        problem = config.get("problem_type")
        self._multiple = problem == "multi_label_classification" or len(self.labels) == 1
        self._raw = problem == "regression"
        self.answers = answers.kind(problem, len(self.labels)) if self.gives == CLASSES else EMBEDDINGS
        self.longest = _longest(config, text, self.pooling)
        text.tokenizer.enable_truncation(self.longest)
        self._padding = _padding(config, text)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        adapter: AdapterChoice = "default",
        *,
        threads: int | None = None,
        deep: bool = True,
        four_bit: FourBit | None = None,
        reread: bool = False,
        huge_pages: bool = False,
    ) -> Encoder:
        """Verify the bundle in `folder` and open it; all as `Session.open`."""
        manifest, graph, looked = open_graph(
            Path(folder), "encoder", threads, deep, four_bit, reread, huge_pages=huge_pages
        )
        encoder = cls(manifest, graph, BundleText(manifest.folder))
        encoder.verified = looked
        encoder.swap(adapter)
        return encoder

    def embed(self, texts: Sequence[str], normalize: bool | None = None, batch: int = 32) -> Float32:
        """Embeddings (len(texts), d), pooled as the folder says (see device/pooling.py).

        normalize: to a length of 1; None as the folder says. batch: texts run at once, at most. Raises
        BundleError when the model gives classes, DataError when a text can't be read.
        """
        if self.gives != EMBEDDINGS:
            raise BundleError(f"{self.manifest.folder} gives classes, not embeddings; ask for probabilities")
        found = self.outputs(self.encode(texts), batch)
        return unit(found) if normalize else found

    def probabilities(self, texts: Sequence[str | tuple[str, str]], batch: int = 32) -> Float32:
        """Probabilities (len(texts), classes) of the `labels` for texts or pairs of texts.

        They sum to 1 but where the model was trained on several labels at once; a regression's are its raw
        values. Raises as `embed`.
        """
        if self.gives != CLASSES:
            raise BundleError(f"{self.manifest.folder} gives embeddings, not classes; ask for those")
        logits = self.outputs(self.encode(texts), batch)
        if self._raw:
            return logits
        if self._multiple:
            return (1 / (1 + np.exp(-logits))).astype(np.float32)
        powers: Float32 = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoded]:
        """Token ids of each text, with what the tokenizer puts around it."""
        if isinstance(texts, str):
            raise DataError("one text was given where a list of texts belongs; put it into a list")
        prompt = self.pooling.prompt if self.gives == EMBEDDINGS else ""
        found = self.text.batch([prompt + text if isinstance(text, str) else text for text in texts])
        if not all(one.ids for one in found):
            raise DataError("a text has no token; leave empty texts out")
        return [Encoded(np.array(one.ids, np.int64), np.array(one.type_ids, np.int64)) for one in found]

    def outputs(self, encoded: Sequence[Encoded], batch: int = 32, vectors: Vectors | None = None) -> Float32:
        """Pooled embeddings (n, d) or class logits (n, classes), whatever the model gives.

        vectors: of the adapter (`vectors_of`); None: the active one's.
        """
        if batch < 1 or not encoded:
            raise DataError("give one text or more, in batches of one or more")
        vectors = self.vectors if vectors is None else vectors
        out: Float32 | None = None
        for rows in _batches([len(one.ids) for one in encoded], batch):
            found = self._run([encoded[row] for row in rows], vectors)
            if out is None:
                out = np.empty((len(encoded), found.shape[1]), np.float32)
            out[rows] = found
        assert out is not None
        return out

    def _run(self, rows: Sequence[Encoded], vectors: Any) -> Float32:
        shape = len(rows), max(len(one.ids) for one in rows)
        feeds = {
            "input_ids": np.full(shape, self._padding, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for row, one in enumerate(rows):
            part = row, slice(len(one.ids))
            feeds["input_ids"][part], feeds["token_type_ids"][part] = one.ids, one.types
            feeds["attention_mask"][part] = 1
        taken = {name: value for name, value in feeds.items() if name in self.graph.inputs}
        try:
            (found,) = self.graph.session.run([self.gives], {**taken, **vectors})
        except Exception as cause:  # onnxruntime's classes share no base but Exception
            raise BundleError(f"ONNX Runtime fails on {self.graph.path}: {first_line(cause)}") from None
        values: Float32 = found.astype(np.float32, copy=False)
        return values if self.gives == CLASSES else self.pooling.embeddings(values, feeds["attention_mask"])


def _output(graph: Graph) -> str:
    for name, rank in ((EMBEDDINGS, 3), (CLASSES, 2)):
        port = graph.outputs.get(name)
        if port is not None and len(port.shape) == rank and not graph.inputs.keys() - _INPUTS:
            return name
    raise BundleError(
        f"{graph.path} takes {', '.join(graph.inputs)} and gives {', '.join(graph.outputs)}; vera-edge runs "
        "encoders of text that give embeddings or one class for a text, so open it in ONNX Runtime itself"
    )


def _labels(config: dict[str, Any], size: Any) -> tuple[str, ...]:
    named = config.get("id2label")
    count = size if isinstance(size, int) else len(named) if isinstance(named, dict) else 0
    names = named if isinstance(named, dict) else {}
    return tuple(str(names.get(str(number), f"LABEL_{number}")) for number in range(count))


def _longest(config: dict[str, Any], text: BundleText, found: Pooling) -> int:
    """Tokens of the longest text: the least of what the tokenizer, the positions and the folder allow."""
    positions = config.get("max_position_embeddings")
    if type(positions) is int and config.get("model_type") in SHIFTED:
        positions -= _padding(config, text) + 1
    given = positions, text.longest, found.longest
    # Tokenizers without a limit say 10**30.
    return min((size for size in given if type(size) is int and 0 < size < _ENDLESS), default=512)


def _padding(config: dict[str, Any], text: BundleText) -> int:
    # As config.json has it, for a decoder's classifier looks for the last token that isn't this one.
    found = config.get("pad_token_id")
    if type(found) is not int or not 0 <= found < _ENDLESS:
        found = text.tokenizer.token_to_id(text.special.get("pad_token", ""))
    return found if type(found) is int and found >= 0 else 0


def _batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Rows of like length together, at most `batch` and about _TOKENS tokens with their padding."""
    rows: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        # Lengths only grow, so the row that comes is the longest.
        if rows and (len(rows) == batch or (len(rows) + 1) * lengths[row] > _TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
