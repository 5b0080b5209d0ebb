"""Bytes out of the middle of a file; one that ends too soon and one that can't be read are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vera_edge.arrays import Bytes
from vera_edge.errors import CheckpointError, ReadError


def read(path: Path, start: int, sizes: Iterable[int], what: str) -> Iterator[Bytes]:
    """As many bytes of the file as each of `sizes` says, one after the other from `start` on.

    Raises CheckpointError when the file ends before, inside `what`; ReadError when the system refuses.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            for size in sizes:
                data, done = np.empty(size, np.uint8), 0
                # Not np.fromfile, which takes a failing disk for the end of the file.
                while done < size and (count := stream.readinto(data.data[done:])):
                    done += count
                if done != size:
                    raise CheckpointError(f"{path} ends inside {what}; copy or download it again")
                yield data
    except OSError as cause:
        raise ReadError(f"{path} can't be read: {cause.strerror or cause}; run again when it can") from cause
