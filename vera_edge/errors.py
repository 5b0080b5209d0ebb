"""The errors that vera-edge raises on purpose.

    VeraEdgeError            exit 2: the input or the request is at fault
    ├── AdapterError         an adapter folder that can't be read or isn't VeRA
    ├── CheckpointError      a base folder that can't be read, or contradicts itself
    │   ├── ReadError        the system refuses to read it, now
    │   └── FormatError      a weight format that isn't known, or is of an unknown version
    ├── WorkerError          processes or a cluster that keep dying
    ├── MismatchError        adapter, base and artefact are each sound but don't belong together
    ├── PlanError            a request that can't be planned: unknown module, format, option
    ├── TargetError          an export target that is missing or refuses the model
    ├── DataError            text or token data that can't be used
    ├── BundleError          an artefact on disk that is damaged, foreign or unsafe
    └── OutputError          the output can't be written: it exists, the disk is full, read-only
    DriftExceeded            exit 3: everything ran, and a limit was broken

    BundleWarning            a Python warning: the bundle runs here, and gives wrong values in other programs

Every message is one sentence that says what is wrong, where, and what to do. The command line prints
it without a traceback; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from vera_edge import printable

_LONGEST = 2000  # characters; a longer sentence says no more


class VeraEdgeError(Exception):
    """Base of all errors that are the input's or the request's fault.

    Names out of a stranger's file stand in the messages: what would end a line, steer a terminal or be no
    character is written as its escape, and what is too long to read is cut.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


def _one_line(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return printable.line(text)


class AdapterError(VeraEdgeError):
    """An adapter folder can't be read, or holds another PEFT method."""


class CheckpointError(VeraEdgeError):
    """A base checkpoint can't be read, or its parts contradict each other."""


class FormatError(CheckpointError):
    """A weight format is unknown, or of a version that isn't known."""


class ReadError(CheckpointError):
    """A file of a checkpoint can't be read now: a disk, a network or its rights say no, and may not later."""


class WorkerError(VeraEdgeError):
    """Processes or a cluster that do the work keep dying; what they finished stays."""


class MismatchError(VeraEdgeError):
    """Adapter, base and artefact are each sound, but don't belong together."""


class PlanError(VeraEdgeError):
    """What was asked for can't be planned."""


class TargetError(VeraEdgeError):
    """An export target is missing, or refuses the model."""


class DataError(VeraEdgeError):
    """Text or token data that can't be used."""


class BundleError(VeraEdgeError):
    """An artefact on disk is damaged, foreign or unsafe."""


class BundleWarning(UserWarning):
    """A bundle runs here, and would give wrong values in other programs on this processor."""


class OutputError(VeraEdgeError):
    """The output can't be written."""


class DriftExceeded(VeraEdgeError):
    """Everything ran, and a drift limit was broken."""

    exit_code = 3


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list for a message: "a, b, c and 4 more"."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
