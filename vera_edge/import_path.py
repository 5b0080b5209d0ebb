"""Where Python looks for modules: never in the folder that a command happens to be started in.

A person stands in the bundle or the checkpoint that they look at, and that folder may hold a `numpy.py`.
Python looks there first when it is started with `-m` or `-c`, and wherever PYTHONPATH has an empty or a
relative entry.

This module comes before any other, while that folder may still come first: it imports only what every
interpreter has loaded by itself by then, and not even `__future__`.
"""

import os
import sys

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that holds vera_edge
_STANDARD_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))


def protect() -> None:
    """Take the working folder and relative entries off this process's path, and off that of its children.

    The folder that holds vera_edge itself stays, and so does what PYTHONPATH names by its whole path.
    """
    before, kept = _before_library(), {*_absolute(), _PACKAGE}
    relative = {_whole(entry) for entry in ("", *_listed()) if not os.path.isabs(entry)}
    sys.path[:before] = [
        entry for entry in sys.path[:before] if _whole(entry) in kept or _whole(entry) not in relative
    ]
    os.environ.update(child_environment())


def child_environment() -> dict[str, str]:
    """What to add to the environment of a Python child, so that it looks in no working folder either.

    The child finds the vera_edge of this process.
    """
    entries = _absolute()
    if _PACKAGE not in (*entries, *sys.path[_before_library() :]):
        entries.append(_PACKAGE)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entries)}


def _listed() -> list[str]:
    """The entries of PYTHONPATH; an empty one is the working folder."""
    path = os.environ.get("PYTHONPATH")
    return path.split(os.pathsep) if path else []


def _absolute() -> list[str]:
    return [entry for entry in _listed() if os.path.isabs(entry)]


def _whole(entry: str) -> str:
    """An entry of the path as an absolute one; itself where the working folder is gone."""
    try:
        return os.path.abspath(entry)
    except OSError:
        return entry


def _before_library() -> int:
    """How many entries of the path come before the standard library: the script's folder and PYTHONPATH."""
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    for number, entry in enumerate(sys.path):
        if os.path.basename(entry) == archive or entry == _STANDARD_LIBRARY:
            return number
    return 0
