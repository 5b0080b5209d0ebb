"""How long a layer's product takes in each format, for one token: on this machine, or as a device told.

A device's own times are in the file of `vera-edge bench BUNDLE --products --json`, run there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vera_edge.cores import available_cores
from vera_edge.device.check.products import DEFAULT_BLOCKS, ProductKind, nanoseconds, parse_formats
from vera_edge.errors import PlanError
from vera_edge.plans.plan import DENSE, Step
from vera_edge.rounding.weight_rounding import BLOCK
from vera_edge.storage.json_text import TABLE, read_json

_LONGEST = 10**12  # nanoseconds that a product may take in a file that is believed


class ProductTimes(Protocol):
    """Nanoseconds by kind of product, and whose they are."""

    @property
    def device(self) -> str: ...

    def time(self, kind: ProductKind) -> int: ...


def kind_of(step: Step) -> ProductKind:
    """What a plan's step is multiplied as."""
    if step.result in DENSE:
        return ("fp32", step.shape, 0)
    return (step.result, step.shape, int(step.options.get("blocksize", step.options.get("block", BLOCK))))


@dataclass(frozen=True)
class MachineTimes:
    """This machine's, each kind measured when it's first asked for."""

    device: str = "this machine"
    _known: dict[ProductKind, int] = field(default_factory=dict)

    def time(self, kind: ProductKind) -> int:
        """Nanoseconds of one product of this kind."""
        if kind not in self._known:
            self._known[kind] = nanoseconds(kind, available_cores())
        return self._known[kind]


@dataclass(frozen=True)
class DeviceTimes:
    """A device's, by (format, block) and shape (out, in), at the number of threads that was the fastest.

    A shape that wasn't measured is reckoned from the measured one whose number of weights is the nearest, in
    proportion: one token's product takes as long as reading its weights does.
    """

    device: str
    threads: int
    products: Mapping[tuple[str, int], Mapping[tuple[int, int], int]]

    def require(self, formats: Sequence[str]) -> None:
        """Raise PlanError unless the device told of all these formats ("int8" or "int8:64").

        DataError for what is none.
        """
        missing = [name for name in formats if parse_formats([name])[0] not in self.products]
        if missing:
            raise PlanError(
                f"the times of {self.device} have no {' and '.join(missing)}; measure there again (vera-edge "
                f"bench BUNDLE --products {','.join(missing)} with the others, --json), or leave it out of "
                "--formats"
            )

    def time(self, kind: ProductKind) -> int:
        """Nanoseconds of one product, whose format and block were measured (`require`)."""
        name, shape, block = kind
        known = self.products[name, block or DEFAULT_BLOCKS[name]]
        if shape in known:
            return known[shape]
        weights = shape[0] * shape[1]
        rows, columns = min(known, key=lambda one: abs(one[0] * one[1] - weights))
        return max(1, round(known[rows, columns] * weights / (rows * columns)))


def read_times(path: Path) -> DeviceTimes:
    """The product times in what `vera-edge bench --products --json` wrote on a device.

    Raises PlanError when the file holds none, or is damaged.
    """
    told = read_json(path, PlanError, TABLE)
    by_threads: dict[int, dict[tuple[str, int], dict[tuple[int, int], int]]] = {}
    try:
        for row in told["products"]:
            threads, out, inside, spent = (
                _count(row[name]) for name in ("threads", "out", "inside", "nanoseconds")
            )
            name, block = row["format"], row["block"]
            if name not in DEFAULT_BLOCKS or type(block) is not int or block < 0:
                raise ValueError(name)
            by_threads.setdefault(threads, defaultdict(dict))[name, block][out, inside] = spent
        device = str(told["device"].get("processor") or path.name)
    except (KeyError, TypeError, ValueError, AttributeError):
        by_threads = {}
    if not by_threads or len({_kinds(one) for one in by_threads.values()}) != 1:
        raise PlanError(
            f"{path} has no times of products as `vera-edge bench BUNDLE --products --json` of this version "
            "writes them; measure again on the device"
        )
    threads = min(by_threads, key=lambda count: _total(by_threads[count]))
    return DeviceTimes(device, threads, by_threads[threads])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= _LONGEST:
        raise ValueError(value)
    return value


def _kinds(products: Mapping[tuple[str, int], Mapping[tuple[int, int], int]]) -> frozenset[object]:
    return frozenset((kind, shape) for kind, shapes in products.items() for shape in shapes)


def _total(products: Mapping[tuple[str, int], Mapping[tuple[int, int], int]]) -> int:
    return sum(sum(shapes.values()) for shapes in products.values())
