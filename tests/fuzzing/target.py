"""A reader under test: its seeds, how it's called, and what it may answer."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzzing.mutate import Form, mutate
from vera_edge.errors import VeraEdgeError

# What the command line tells of any path in one sentence, whoever looks at it.
_REFUSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Seed:
    """A sound input. beside: which of a target's fixed files it goes with, where there are several."""

    data: bytes
    beside: str = ""


@dataclass(frozen=True)
class Target:
    """A reader. `prepare` puts what isn't changed into a folder, once; `read` writes `data` beside it and
    calls the reader as a command does. words: of which texts are made. seal: makes a changed input one whose
    checksum is right, so that what comes behind the checksum is read too."""

    name: str
    form: Form
    seeds: Callable[[], list[Seed]]
    read: Callable[[Seed, Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    words: tuple[str, ...] = ()
    seal: Callable[[bytes], bytes] | None = None

    def input(self, seeds: list[Seed], draw: Random) -> Seed:
        """An input made of one of `seeds`."""
        seed = draw.choice(seeds)
        data = mutate(seed.data, self.form, draw, self.words)
        if self.seal is not None and draw.random() < 0.8:
            data = self.seal(data)
        return Seed(data, seed.beside)


class Misread(Exception):
    """A reader refused an input in other words than one sentence."""


def attempt(target: Target, seed: Seed, folder: Path) -> bool:
    """Give a reader an input; whether it was taken. Raises whatever isn't one sentence about it."""
    try:
        target.read(seed, folder)
    except VeraEdgeError as error:
        if not str(error).strip() or len(str(error).splitlines()) != 1:
            raise Misread(f"not one line: {str(error)!r}") from error
        str(error).encode()  # a terminal takes no half of a surrogate pair
        return False
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True
