"""What bounds a server: rows, queue, lengths, times; and who may change its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vera_edge.bundle.signing import Trust
from vera_edge.errors import PlanError

LONGEST = 4096  # tokens of a text and its answer, unless it's asked for more: bounds the caches


@dataclass(frozen=True)
class Settings:
    """rows: texts that are generated together. queue: requests that may wait for a row.

    context: tokens that a prompt and its answer may have, None for the model's own context up to LONGEST.
    timeout: seconds that a request may take in all. max_body: bytes of a request. varying: see Rows.
    api_key: what clients must send, None for none. adapters_from: the folder that adapters may be added
    from, None where none may. trust: whose signature they must carry.
    """

    rows: int = 8
    queue: int = 32
    context: int | None = None
    timeout: float = 600.0
    max_body: int = 4 << 20
    varying: bool = False
    api_key: str | None = field(default=None, repr=False)
    adapters_from: Path | None = None
    trust: Trust = field(default_factory=Trust)

    def __post_init__(self) -> None:
        """Raises PlanError when a bound can't be kept."""
        for name, holds, range_ in (
            ("rows", 1 <= self.rows <= 1024, "from 1 to 1024"),
            ("queue", 0 <= self.queue <= 65536, "from 0 to 65536"),
            ("context", self.context is None or self.context >= 2, "2 or more"),
            ("timeout", 0 < self.timeout <= 86400, "above 0 and at most 86400 seconds"),
            ("max_body", self.max_body >= 1024, "1024 bytes or more"),
        ):
            if not holds:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be {range_}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise PlanError("the API key is empty or isn't ASCII; give one that a header can carry")
        if self.adapters_from is not None and not self.adapters_from.is_dir():
            raise PlanError(f"{self.adapters_from} isn't a folder that adapters can be added from; make it")

    @property
    def open(self) -> int:
        """Requests that may be in the server at once."""
        return self.rows + self.queue
