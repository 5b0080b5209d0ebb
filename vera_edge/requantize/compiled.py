"""Loops that no matrix product can replace, compiled by numba; what holds some is imported when it is needed.

Compiled code is kept on disk beside the source or, where that can't be written, in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """`function`, compiled at its first call, to run without the interpreter's lock.

    A product may be fused with the sum it goes into; no sum is ordered anew, so that results don't depend on
    where a piece of an array begins.
    """
    return _compiled(function, fastmath={"contract"})


def compiled_as_written(function: F) -> F:
    """As `compiled`, but no product is fused with a sum, for results that another program's bits hold."""
    return _compiled(function)


def _compiled(function: F, **more: Any) -> F:
    how = {"nogil": True, "error_model": "numpy", **more}
    try:
        return numba.njit(cache=True, **how)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(**how)(function)
