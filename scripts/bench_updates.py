"""What a slow link carries from one bundle to the next: bytes of the chunks that the old one hasn't.

python -m scripts.bench_updates OLD NEW [NEW ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle


def transfer(old: Path, new: Path) -> tuple[int, int]:
    """Bytes of the bundle `new`, and how many of them a device that holds `old` lacks."""
    known = {one.sha256 for name in _names(old) for one in chunks.split(old / name)}
    pieces = [one for name in _names(new) for one in chunks.split(new / name)]
    return sum(one.size for one in pieces), sum(one.size for one in pieces if one.sha256 not in known)


def _names(folder: Path) -> list[str]:
    return [bundle.MANIFEST, *bundle.read(folder).files]


if __name__ == "__main__":
    for found in map(Path, sys.argv[2:]):
        size, lacking = transfer(Path(sys.argv[1]), found)
        print(
            f"{found}: {size / 1e6:.3f} MB, {lacking / 1e6:.3f} MB of it to transfer ({lacking / size:.2%})"
        )
