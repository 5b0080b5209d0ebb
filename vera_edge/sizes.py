"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from vera_edge.errors import PlanError

_SIZE = re.compile(r"(\d{1,20}(?:\.\d*)?|\.\d+)\s*([kmg]i?b|b?)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "90MB" (10^6), "1.5GiB" (2^30), "90000000". Raises PlanError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise PlanError(f"{text!r} isn't a size; write it as 90MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])
