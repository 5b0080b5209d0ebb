"""`vera_edge.diff` and `diff_adapters`: what changed from one to the next."""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath
from vera_edge.releasing.difference import Difference, compare_adapters, compare_bundles

__all__ = ["Difference", "diff", "diff_adapters"]


def diff(old: StrPath, new: StrPath) -> Difference:
    """Say what changed from one bundle to another: facts, drift, plan, files, bytes to transfer.

    Args:
        old, new: the bundles' folders.

    Returns:
        A Difference: `facts` by name (old, new), `files` by name (old bytes, new bytes), and `transfer`, the
        bytes that a device with the old one lacks.

    Raises:
        BundleError: a bundle's manifest can't be read.

    Example:
        >>> found = vera_edge.diff("bundle", "newer")
        >>> found.same, "limits" in found.facts
        (False, True)
    """
    return compare_bundles(Path(old), Path(new))


def diff_adapters(old: StrPath, new: StrPath) -> Difference:
    """Compare two PEFT adapters: what differs, and by how much, layer by layer.

    Args:
        old, new: the adapters' folders.

    Returns:
        A Difference; `layers` has |new - old| / |old| of the vectors, by module.

    Raises:
        AdapterError: an adapter can't be read.

    Example:
        >>> found = vera_edge.diff_adapters("adapter", "adapter")
        >>> found.same
        True
    """
    return compare_adapters(Path(old), Path(new))
