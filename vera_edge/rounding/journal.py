"""What rounding has finished, on disk, so that a run that was killed goes on from there.

A folder for each module, taken only when its last file says what the others are: what a kill cut off is done
again. Which work a journal is of, `key_of` says: everything that decides a byte of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from vera_edge import __version__, versions
from vera_edge.adapters.adapter import LayerChange
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.errors import OutputError
from vera_edge.requantize import Codes, CodesFolder, Grid, devices
from vera_edge.requantize.correction import Correction
from vera_edge.storage.files import output_error, sha256_bytes, sha256_file, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.trained.trained_model import TrainedModel

_TOOLS = ("numpy", "torch", "transformers", "numba", "scipy", "mkl")
_LAST, _REST = "done.json", "rest.safetensors"


@dataclass(frozen=True)
class Rounded:
    """One module: its codes, an adapter's vectors where they were refitted, and what its output gets."""

    codes: Codes
    vectors: LambdaVectors | None = None
    correction: Correction | None = None


@dataclass
class RoundingJournal(Mapping[str, Codes]):
    """The codes of modules in `folder`, by name, and what goes with them; `grids`: of all that are wanted."""

    folder: Path
    grids: Mapping[str, Grid]
    _done: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module in self.grids:
            if _is_whole(self._place(module), module):
                self._done[module] = None

    def put(self, module: str, rounded: Rounded) -> None:
        """Keep what became of a module. Raises OutputError when the disk is full or refuses."""
        place = self._place(module)
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            CodesFolder(place).put(module, rounded.codes)
            if rest := _rest(rounded):
                save_file(rest, place / _REST)
            files = {path.name: sha256_file(path) for path in sorted(place.iterdir())}
            write_atomic(place / _LAST, canonical_json({"module": module, "files": files}))
        except OutputError:
            raise
        except OSError as cause:
            raise output_error(place, cause) from cause
        except Exception as cause:  # safetensors reports a full disk as its own error
            raise OutputError(f"can't write {place}: {cause}") from cause
        self._done[module] = None

    def moved(self, folder: Path) -> RoundingJournal:
        """The same, whose folder is now called `folder`, on the same disk; this one holds nothing then."""
        try:
            self.folder.rename(folder)
        except OSError as cause:
            raise output_error(folder, cause) from cause
        return RoundingJournal(folder, self.grids)

    def read(self, module: str) -> Rounded:
        """What was put."""
        place, rest = self._place(module), dict[str, npt.NDArray[Any]]()
        if (place / _REST).is_file():
            rest = load_file(place / _REST)
        vectors, correction = None, None
        if "lambda_b" in rest:
            vectors = LambdaVectors(rest["lambda_b"], rest["lambda_d"])
        if rest.keys() & {"up", "bias"}:
            correction = Correction(rest.get("up"), rest.get("down"), rest.get("bias"))
        return Rounded(self[module], vectors, correction)

    def __getitem__(self, module: str) -> Codes:
        if module not in self._done:
            raise KeyError(module)
        return CodesFolder(self._place(module), {module: self.grids[module]})[module]

    def __contains__(self, module: object) -> bool:
        return module in self._done

    def __iter__(self) -> Iterator[str]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)

    def _place(self, module: str) -> Path:
        return self.folder / sha256_bytes(module.encode())[:32]


def _rest(rounded: Rounded) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any] | None] = {}
    if rounded.vectors is not None:
        found |= {"lambda_b": rounded.vectors.lambda_b, "lambda_d": rounded.vectors.lambda_d}
    if (correction := rounded.correction) is not None:
        found |= {"up": correction.up, "down": correction.down, "bias": correction.bias}
    return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}


def _is_whole(place: Path, module: str) -> bool:
    """Whether a module's folder holds what its last file says."""
    try:
        last = json.loads((place / _LAST).read_bytes())
        files = dict(last["files"])
        return last["module"] == module and all(
            sha256_file(place / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def key_of(model: TrainedModel, grids: Mapping[str, Grid], calibration: Any, merged: bool, task: str) -> str:
    """Hex SHA-256 of all that decides what rounding gives: two runs of one key give the same bytes.

    calibration: a `writeback.Calibration`. Reads the base, whose tensors are a part of it.
    """
    checkpoint, windows = model.checkpoint, hashlib.sha256()
    for window in calibration.windows:
        windows.update(np.ascontiguousarray(window, "<i8").tobytes() + b"|")
    decides = {
        "base": [checkpoint.digest, checkpoint.layout_digest],
        "placed": {name: sha256_bytes(raw.data.tobytes()) for name, raw in checkpoint.placed.items()},
        "adapters": [[adapter.digest, weight] for adapter, weight in model.adapters],
        "vectors": [_vectors_digest(adapter.vectors) for adapter, _ in model.adapters],
        "projections": model.projection_digest,
        "grids": {module: repr(grid) for module, grid in grids.items()},
        "how": [calibration.method, calibration.sees, calibration.follow, list(calibration.recover)],
        "effort": asdict(calibration.effort),
        "device": devices.told(calibration.device),
        "text": windows.hexdigest(),
        "as": [merged, task, __version__, versions.installed(_TOOLS)],
        "threads": torch.get_num_threads(),  # they may change how a product is summed up
    }
    return sha256_bytes(json.dumps(decides, sort_keys=True).encode())


def _vectors_digest(vectors: Mapping[str, LayerChange]) -> str:
    digest = hashlib.sha256()
    for module, change in sorted(vectors.items()):
        digest.update(json.dumps(module).encode())
        digest.update(b"|".join(array.tobytes() for array in change.arrays.values()))
    return digest.hexdigest()
