"""Linear layers that a bundle ships in 4 bits and its graph reads as int8 blocks: expanded on the device.

The manifest's `generated` names the safetensors file they are shipped in (bitsandbytes' own layout) and, by
weight of the graph, which rows of which modules it is stacked of and where its codes and scales begin:

    {"onnx/model.onnx_data_1": {"size": 127401984, "sha256": "...", "source": "model.4bit.safetensors",
        "block": 32, "weights": {"model.layers.0.mlp.gate_proj.weight": {"codes": 0,
            "scales": 884736, "rows": [["model.layers.0.mlp.gate_proj", 0, 1536]]}, ...}}}

Codes are uint8 (rows, in / block, block), scales little-endian float32 (rows, in / block), as MatMulNBits has
them; bytes between are zero. Each step is one float32 operation, so every machine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge import formats
from vera_edge.arrays import Array
from vera_edge.bundle.manifest import Manifest
from vera_edge.errors import BundleError
from vera_edge.formats.blocks import SIZES, IntBlocks, quantize
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import open_atomic, safe_join
from vera_edge.storage.tensors import TensorFolder

_FORMATS = ("nf4", "fp4")
_BITS = 8


@dataclass(frozen=True)
class _Place:
    """A weight of the graph: its modules' rows, (module, start, stop), and its two offsets in the file."""

    rows: tuple[tuple[str, int, int], ...]
    codes: int
    scales: int


def blocks(weight: formats.Weight, start: int, stop: int, block: int) -> IntBlocks:
    """Rows of a 4-bit weight in symmetric int8 blocks; NF4's levels move by 0.4 % of their absmax at most."""
    return quantize(weight.rows(start, stop), _BITS, block, symmetric=True)


def names(weight: str) -> tuple[str, str]:
    """The graph's initializers of a weight: its codes and its scales."""
    return f"{weight}.int{_BITS}", f"{weight}.scales"


def in_memory(manifest: Manifest, only: Collection[str] | None = None) -> dict[str, Array]:
    """By initializer of the graph, what the expanded files that aren't there would hold; often nothing.

    only: of these initializers.
    """
    found: dict[str, Array] = {}
    for file, entry in manifest.expanded.items():
        if not manifest.path(file).is_file():
            for weight, _, codes, scales in _weights(manifest, file, entry, manifest.folder, only):
                found |= zip(names(weight), (codes, scales), strict=True)
    return found


def write(manifest: Manifest, folder: Path, progress: Progress = silent) -> None:
    """Expand into `folder` what it, or else the bundle's own, holds; each file whole or not at all.

    Whether it is what the manifest lists is for `bundle.verify` to say. Raises BundleError when the layout
    isn't sound, CheckpointError when the shipped weights aren't, OutputError when the disk refuses.
    """
    for file, entry in manifest.expanded.items():
        size, root = manifest.drawn[file].size, folder
        if not safe_join(folder, entry["source"]).is_file():
            root = manifest.folder
        with open_atomic(safe_join(folder, file)) as stream:
            for done, (weight, place, *arrays) in enumerate(_weights(manifest, file, entry, root)):
                progress("expanding the weights", done, len(entry["weights"]))
                for offset, array in zip((place.codes, place.scales), arrays, strict=True):
                    if offset + array.nbytes > size:
                        raise BundleError(f"{weight} reaches past the end of {file}; export the bundle again")
                    stream.seek(offset)
                    stream.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            stream.truncate(size)


def _weights(
    manifest: Manifest,
    file: str,
    entry: Mapping[str, Any],
    folder: Path,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, _Place, Array, Array]]:
    """Every weight of a file with its place, codes and scales; or those which `only` names one of."""
    places, block = _layout(manifest, file, entry)
    source = safe_join(folder, entry["source"])
    tensors = TensorFolder.open(source.parent, source.name.removesuffix(".safetensors"), BundleError)
    stored = {module: one for kind in _FORMATS for module, one in formats.get(kind).find(tensors, {}).items()}
    left = entry["size"]
    for weight, place in places.items():
        if only is not None and not any(name in only for name in names(weight)):
            continue
        parts = []
        for module, start, stop in place.rows:
            if module not in stored or stop > stored[module].out_features:
                raise BundleError(
                    f"{source} lacks rows {start} to {stop} of {module}; export the bundle again"
                )
            left -= (stop - start) * stored[module].in_features
            if left < 0:
                raise BundleError(f"the weights of {file} are more than it has room for; export it again")
            parts.append(blocks(formats.load(tensors, stored[module]), start, stop, block))
        codes, scales = ([getattr(part, name) for part in parts] for name in ("codes", "scales"))
        yield weight, place, np.concatenate(codes), np.concatenate(scales)


def _layout(manifest: Manifest, file: str, entry: Mapping[str, Any]) -> tuple[dict[str, _Place], int]:
    """The weights of an entry, and the block they are expanded to."""
    try:
        found = {weight: _place(**value) for weight, value in entry["weights"].items()}
        if entry["block"] in SIZES and entry["source"] in manifest.files:
            return found, entry["block"]
        raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BundleError(
            f"{manifest.folder} doesn't say how {file} is laid out in a way that vera-edge knows; update it"
        ) from None


def _place(rows: Any, codes: Any, scales: Any) -> _Place:
    found = _Place(tuple((module, start, stop) for module, start, stop in rows), codes, scales)
    numbers = [codes, scales, *(number for row in found.rows for number in row[1:])]
    sound = all(type(number) is int and number >= 0 for number in numbers)
    if not sound or not found.rows or any(start >= stop for _, start, stop in found.rows):
        raise ValueError
    return found
