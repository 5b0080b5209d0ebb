"""Codes on disk, a file for each module: a whole model is requantized in the memory of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from vera_edge.errors import OutputError
from vera_edge.formats.nested import BLOCKSIZE, Nested, code_book
from vera_edge.requantize.grids import Codes, Grid
from vera_edge.storage.files import output_error


@dataclass(frozen=True)
class CodesFolder(Mapping[str, Codes]):
    """Codes by module name, in a folder that lives as long as the work: not a format to keep or to share."""

    folder: Path
    grids: dict[str, Grid] = field(default_factory=dict)

    def put(self, module: str, codes: Codes) -> None:
        """Write the codes of one module. Raises OutputError when the disk is full or refuses."""
        if module in self.grids:
            raise ValueError(f"the codes of {module} are there already")
        path = self.folder / f"{len(self.grids)}.safetensors"
        arrays: dict[str, npt.NDArray[Any]] = {"codes": codes.codes, "scales": codes.scales}
        if codes.zeros is not None:
            arrays["zeros"] = codes.zeros
        for name, array in (codes.stored or {}).items():
            arrays[f"stored.{name}"] = array
        if codes.nested is not None:
            arrays["nested_codes"] = codes.nested.codes
            arrays["nested_scales"] = codes.nested.scales
            arrays["nested_offset"] = np.array([codes.nested.offset], np.float32)
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        except OSError as cause:
            raise output_error(path, cause) from cause
        except Exception as cause:  # safetensors reports a full disk as its own error
            raise OutputError(f"can't write {path}: {cause}") from cause
        self.grids[module] = codes.grid

    def __getitem__(self, module: str) -> Codes:
        if module not in self.grids:
            raise KeyError(module)
        number = list(self.grids).index(module)
        arrays = load_file(self.folder / f"{number}.safetensors")
        nested = None
        if "nested_codes" in arrays:
            offset = np.float32(arrays["nested_offset"][0])
            nested = Nested(arrays["nested_codes"], code_book(), arrays["nested_scales"], BLOCKSIZE, offset)
        stored = {name[7:]: array for name, array in arrays.items() if name.startswith("stored.")}
        known = (arrays["codes"], arrays["scales"], arrays.get("zeros"), nested, stored or None)
        return Codes(self.grids[module], *known)

    def __iter__(self) -> Iterator[str]:
        return iter(self.grids)

    def __len__(self) -> int:
        return len(self.grids)
