"""Values that an adapter trained, in the float type that a graph takes them in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError

# A vector that float16 changes by more than this share can't be stored so. Rounding to its 11 bits changes a
# value by 2^-11, a two-thousandth, at most; more is lost only where values fall below its range.
_LOST = 0.01


def stored(values: Float32, dtype: str, what: str) -> npt.NDArray[Any]:
    """`values` in a dtype. Raises AdapterError when they become infinite, or too little of them is left."""
    with np.errstate(over="ignore"):
        found: npt.NDArray[Any] = values.astype(dtype)
    wide = values.astype(np.float64)
    if not np.linalg.norm(found - wide) <= _LOST * np.linalg.norm(wide):
        raise AdapterError(
            f"{what} doesn't fit {dtype}, which holds 6e-8 to 65504: its largest value is "
            f"{np.abs(wide).max():.3g}; use a bundle that was exported with --vectors fp32"
        )
    return found
