"""What a device has: memory, and how fast it reads weights. By name, or as `vera-edge bench` measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vera_edge.errors import PlanError
from vera_edge.exporting.device_form import Form
from vera_edge.storage.json_text import TABLE, read_json

_SHARE = 5  # of what a measured device has, one part in so many is left to its system


@dataclass(frozen=True)
class DeviceProfile:
    """memory: bytes that a model may take there. stream: bytes of int8 weights that decoding reads a second.

    source: where the numbers are from, and which of them are reckoned.
    """

    name: str
    memory: int
    stream: float
    source: str


def names() -> tuple[str, ...]:
    """The profiles that the package brings."""
    return tuple(_known())


def find(asked: str) -> DeviceProfile:
    """The profile of that name, or of a file that `vera-edge bench BUNDLE --json` wrote on the device.

    Raises PlanError when there is neither, or the file doesn't tell.
    """
    if asked in (known := _known()):
        one = known[asked]
        return DeviceProfile(asked, one["memory"] - one["reserved"], float(one["stream"]), one["source"])
    if not Path(asked).is_file():
        raise PlanError(
            f"no device is called {asked!r}; choose from {', '.join(known)}, or give the file of "
            "`vera-edge bench BUNDLE --json`, run on the device"
        )
    return _measured(Path(asked), read_json(Path(asked), PlanError, TABLE))


def _known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        files(__package__).joinpath("device_profiles.json").read_text(encoding="utf-8")
    )
    return found


def _measured(path: Path, told: Mapping[str, Any]) -> DeviceProfile:
    """The fastest of what was measured there, turned into what int8 weights would reach."""
    try:
        memory = told["device"]["memory"]
        reached = max(
            row["figures"]["decode"]["median"] * row["size"] / Form(row["mode"], row["weights"]).efficiency
            for row in told["measured"]
        )
        whole = type(memory) is int and memory > 0 and 0 < reached < float("inf")
    except (KeyError, TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise PlanError(
            f"{path} doesn't tell memory, and speed and size of a bundle, as `vera-edge bench BUNDLE --json` "
            "of this version writes them; measure again on the device"
        )
    return DeviceProfile(
        path.name,
        memory - memory // _SHARE,
        reached,
        f"from what was measured on {told['device'].get('processor') or 'it'}, with a fifth of its memory "
        "left to the system",
    )
