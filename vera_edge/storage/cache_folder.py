"""Where vera-edge keeps what it can make again: $VERA_EDGE_CACHE, else in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$VERA_EDGE_CACHE, else `vera-edge` in the system's place for caches; it needn't exist.

    Raises RuntimeError when nothing says where the user's home is.
    """
    if given := os.environ.get("VERA_EDGE_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(home).expanduser() / "vera-edge"
