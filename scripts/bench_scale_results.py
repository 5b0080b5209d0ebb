"""What bench_scale measured, kept in one JSON file: a long table is made in several sittings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json

# A model's size and layers, the base's format, the row.
Key = tuple[str, int, str, str]


@dataclass(frozen=True)
class Machine:
    """What the machine could do in the sitting: float32 operations and copied bytes a second."""

    processor: str
    cores: int
    gflops: float
    copied: float


@dataclass(frozen=True)
class Result:
    """A measured row. end: how it ended, see bench_process.Cost; limit: the minutes that it had,
    None for no limit.

    wall, cpu: seconds. peak, anonymous, disk, output, base_bytes, float32: bytes; output: of what it wrote.
    load: of the machine when it began, this row not yet counted. flops: that it needs, where that is known.
    """

    size: str
    layers: int
    all_layers: int
    base: str
    row: str
    end: str
    note: str
    rank: int
    limit: float | None
    wall: float
    cpu: float
    peak: int
    anonymous: int
    disk: int
    output: int
    base_bytes: int
    float32: int
    load: float
    flops: float | None
    machine: Machine
    versions: Mapping[str, str]

    @property
    def key(self) -> Key:
        return self.size, self.layers, self.base, self.row

    @property
    def done(self) -> bool:
        return self.end == "done"


class Results:
    """The results in a file, by key; a row that is measured again takes the place of the earlier one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        self._by_key = {result.key: result for result in map(_result, rows)}

    def __iter__(self) -> Iterator[Result]:
        return iter(self._by_key.values())

    def get(self, key: Key) -> Result | None:
        return self._by_key.get(key)

    def put(self, result: Result) -> None:
        """Keep a result, on the disk as well."""
        self._by_key[result.key] = result
        ordered = [asdict(self._by_key[key]) for key in sorted(self._by_key)]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, canonical_json(ordered))


def _result(row: dict[str, Any]) -> Result:
    known = {field.name: row[field.name] for field in fields(Result)}
    return Result(**known | {"machine": Machine(**row["machine"])})
