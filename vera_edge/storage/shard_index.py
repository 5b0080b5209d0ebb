"""The index of a checkpoint in several files: which it names, and what is to be said of one that is stale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vera_edge.errors import CheckpointError, VeraEdgeError
from vera_edge.storage.files import safe_join
from vera_edge.storage.json_text import TABLE, read_json


def read(index: Path, error: type[VeraEdgeError]) -> tuple[dict[str, str], dict[str, Path]]:
    """Tensor -> file name, and file name -> the file, in the order of their names.

    Raises `error` when it is no index, or names a file that is absent or outside its folder.
    """
    weight_map = read_json(index, error, TABLE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise error(f"{index} has no weight_map from tensor to file name; copy it again")
    files = {name: safe_join(index.parent, name, error) for name in sorted(set(weight_map.values()))}
    for file in files.values():
        if not file.is_file():
            raise error(f"{file} is missing, and {index.name} names it; copy or download it again")
    return weight_map, files


def elsewhere(index: Path, places: Mapping[str, Path], error: type[VeraEdgeError]) -> tuple[str, ...]:
    """A note on tensors that lie in other shards than the index says; `places`: where they are.

    Raises `error` for one that the index lists and no shard holds.
    """
    weight_map, files = read(index, error)
    for name, file in weight_map.items():
        if name not in places:
            raise error(f"{index} says tensor {name} is in {file}, and it isn't; copy the folder again")
    moved = [name for name, place in places.items() if place != files.get(weight_map.get(name, ""))]
    note = f"shards hold {', '.join(moved[:3])} where {index.name} doesn't say so; all of them are read"
    return (note,) if moved else ()


def unread(index: Path, single: Path) -> tuple[str, ...]:
    """A note on an index beside a single file, left from other weights unless it names that very file."""
    if not index.is_file():
        return ()
    try:
        named = set(read_json(index, CheckpointError, TABLE)["weight_map"].values())
    except (CheckpointError, KeyError, AttributeError, TypeError):
        named = set()
    left = f"{index.name} beside {single.name} is left from other weights and isn't read; delete it"
    return () if named == {single.name} else (left,)
