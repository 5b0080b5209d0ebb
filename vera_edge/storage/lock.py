"""One process at a time: an advisory lock on a file, which the system drops when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vera_edge.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, where two writers of one target aren't kept apart
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(path: Path, work: str) -> Iterator[None]:
    """Hold the lock on the file `path`, which is made when it isn't there.

    work: what the lock is held for, as in "merge into out". Raises OutputError at once when another process
    holds it, or has removed it since it was opened; OSError when the file can't be made.
    """
    with path.open("ab") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another {work} is at work; wait for its end or choose another place"
                ) from None
            if not path.exists() or not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                raise OutputError(f"another {work} has just ended; run this one again")
        yield
