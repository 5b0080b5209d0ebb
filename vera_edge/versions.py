"""The versions of installed packages, for records of what made a thing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def installed(names: Sequence[str]) -> dict[str, str]:
    """Distribution name -> version, of those of `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
