"""A folder for files that only the work itself reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vera_edge.storage.files import PARTIAL_MARK, output_error


@contextmanager
def scratch_folder(target: Path, purpose: str) -> Iterator[Path]:
    """A folder next to `target`, so on the disk that has room for it, that is gone in the end.

    What a killed process leaves is swept by the next one that writes `target`. Raises OutputError.
    """
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}{PARTIAL_MARK}{purpose}-", dir=parent)
    except OSError as cause:
        raise output_error(target, cause) from cause
    with scratch as folder:
        yield Path(folder)
