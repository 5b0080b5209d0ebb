"""The importance matrix of a model, which `llama-quantize --imatrix` reads, in llama.cpp's two file formats.

Of every linear layer the mean square of each of its inputs on a text. Source of the formats: llama.cpp's
common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.progress import Progress
from vera_edge.storage.files import write_atomic
from vera_edge.text import mixture, windows
from vera_edge.text import tokenizer as tokenizers
from vera_edge.text.mixture import Mixture
from vera_edge_gguf import file
from vera_edge_gguf.tensor_names import Named

OPTION = "imatrix"
FORMS = ("gguf", "dat")
TOKENS = 16384  # that it is measured on, where there are as many


@dataclass(frozen=True)
class Entry:
    """What a tensor's layer reads: (inputs,) float32 sums of squares over so many tokens."""

    sums: np.ndarray[tuple[int], np.dtype[np.float32]]
    count: int


@dataclass(frozen=True)
class Imatrix:
    """entries: by the tensor's name. datasets: what the texts are called. chunk: tokens of a window."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk: int


def check(options: Mapping[str, str]) -> None:
    """Raise PlanError for a format that isn't known."""
    if (asked := options.get(OPTION)) is not None and asked not in FORMS:
        raise PlanError(f"an importance matrix is written as {' or '.join(FORMS)}, not {asked!r}")


def measure(
    checkpoint: Checkpoint, tensors: Mapping[str, Named], text: str | Mixture, progress: Progress
) -> tuple[Imatrix, str]:
    """That of the linears among `tensors` (by module), and a sentence: on what text.

    Raises DataError on text that can't be used.
    """
    from vera_edge.reference.input_squares import input_squares  # imports torch

    config = checkpoint.config
    tokenizer = tokenizers.read(checkpoint.files, config)
    longest = config.get("max_position_embeddings") or config.get("n_positions") or windows.WINDOW
    window = min(windows.WINDOW, int(longest))
    cut = mixture.cut(Mixture.either(text), tokenizer, int(config["vocab_size"]), TOKENS, window)
    modules = [module for module in tensors if module in checkpoint.linears and module != "lm_head"]
    found = input_squares(checkpoint, modules, cut.windows, progress=progress)
    entries = {
        tensors[module].name: Entry(squares.sums.astype(np.float32), squares.count)
        for module, squares in found.items()
    }
    names = tuple(str(entry["text"]) for entry in cut.to_list())
    said = f"the importance matrix was measured on {cut.said()}"
    return Imatrix(dict(sorted(entries.items())), names, len(cut.windows), window), said


def write(path: Path, architecture: str, found: Imatrix, progress: Progress) -> None:
    """Write it in the format that the name ends in: .gguf, or the older .dat."""
    if path.suffix == ".dat":
        write_atomic(path, _dat(found))
        return
    tensors = []
    for name, entry in found.entries.items():
        count = np.array([[entry.count]], np.float32)
        tensors.append(file.held(f"{name}.in_sum2", entry.sums[None]))
        tensors.append(file.held(f"{name}.counts", count))
    keys = gguf.Keys.IMatrix
    metadata = {
        "general.type": "imatrix",
        keys.DATASETS: list(found.datasets),
        keys.CHUNK_COUNT: found.chunks,
        keys.CHUNK_SIZE: found.chunk,
    }
    file.write(path, architecture, metadata, tensors, progress)


def _dat(found: Imatrix) -> bytes:
    """llama.cpp's first format: of each tensor its name, a number of calls, and the means times that."""
    parts = [struct.pack("<i", len(found.entries))]
    for name, entry in found.entries.items():
        calls = -(-entry.count // found.chunk)
        means = entry.sums / np.float32(entry.count) * np.float32(calls)
        parts += [_text(name), struct.pack("<ii", calls, means.size), means.astype("<f4").tobytes()]
    parts += [struct.pack("<i", found.chunks), _text(found.datasets[-1])]
    return b"".join(parts)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<i", len(data)) + data
