"""Rows of a module's weight, and which of them lie one after the other in a product of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Consecutive output columns of a MatMul: rows `start` to `stop` of a module's weight (out, in)."""

    module: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def put_together(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts in their order; what was taken apart from one module (gate and up of Phi-3) is whole again."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and (last.module, last.stop) == (part.module, part.start):
            found[-1] = Part(part.module, last.start, part.stop)
        else:
            found.append(part)
    return tuple(found)
