"""Holds a float graph against the model in torch before anything of it is published.

A builder of graphs that doesn't know a setting of the config draws the model without it, and says nothing. So
every graph runs on sequences that reach past what the config bounds, and gives what the model gives, or isn't
exported. What is compared is the float graph: what rounding the weights costs is for `drift` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Array
from vera_edge.errors import CheckpointError, TargetError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge_onnx.branch import adapters, branch
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver
from vera_edge_onnx.running import opened_graph
from vera_edge_onnx.sessions import INSTEAD, Feeds

# Two float32 computations of one model differ by 1e-6 to 1e-5 of its outputs' scale; a setting that is left
# out, by 1e-2 and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Checked:
    """What a graph was compared on, for the manifest.

    tokens: of the longest sequence. bounds: what the config bounds (window, original length), in tokens.
    shrunk: the same of a small copy of the model with small bounds, where these are too far to run.
    """

    tokens: int
    bounds: Mapping[str, int] = field(default_factory=dict)
    shrunk: Checked | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest. No measured value: two exports of one model are the same bytes."""
        made: dict[str, Any] = {"tokens": self.tokens, "bounds": dict(self.bounds), "tolerance": TOLERANCE}
        return made | ({} if self.shrunk is None else {"shrunk": self.shrunk.to_dict()})

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Checked:
        """The inverse of `to_dict`."""
        shrunk = cls.from_dict(value["shrunk"]) if "shrunk" in value else None
        return cls(value["tokens"], value["bounds"], shrunk)


class NotTheModel(TargetError):
    """A float graph doesn't give what the model gives."""


class Differs(Exception):
    """A graph's output isn't the model's. error: relative to the output's scale. feeds: that showed it."""

    def __init__(self, error: float, what: str, feeds: Feeds) -> None:
        super().__init__(f"{what} by {error:.2g} of their scale")
        self.error, self.what, self.feeds = error, what, feeds


def distance(expected: Array, found: Array) -> float:
    """The largest difference relative to the largest expected value; infinite where shapes or NaN differ."""
    if expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(expected - found).max(initial=0.0)) / scale


def hold(expected: Array, found: Array, what: str, feeds: Feeds) -> None:
    """Raise Differs when `found` is further from `expected` than TOLERANCE.

    Raises CheckpointError when the model itself gives no numbers.
    """
    if not np.isfinite(expected).all():
        raise CheckpointError(
            f"the model computes NaN or infinity ({what.removesuffix(' differ')}); check its weights, "
            "and the adapter's"
        )
    if (error := distance(expected, found)) > TOLERANCE:
        raise Differs(error, what, feeds)


def woven(request: ExportRequest, graph: ir.Model, sites: Sequence[Site]) -> ir.Model:
    """A copy of a float graph with the side-branches of the request's adapters, projections in float32."""
    copy = graph.clone()
    nodes = {node.name: node for node in copy.graph}
    weaver = Weaver(copy)
    inside = [replace(site, node=nodes[site.node.name]) for site in sites]
    branch.weave(weaver, inside, {}, adapters.inputs(request), request.model.projections, "fp32")
    weaver.finish()
    return copy


def refusal(
    cause: Differs,
    graph: ir.Model,
    sites: Sequence[Site],
    path: Path,
    model: Any,
    forward: Callable[[Feeds], object],
    what: str,
) -> NotTheModel:
    """The error that says which layer differs first, for a `graph` that isn't `what`: "what Llama computes".

    sites: linear layers of the graph. model: in torch; `forward` runs it. path: for a copy of the graph.
    """
    products = {part.module: site.node for site in sites for part in site.parts}
    with _reading(model, list(products)) as expected:
        forward(cause.feeds)
    layer = _first_difference(graph, path, products, expected, cause.feeds)
    where = f"first in what {layer} reads" if layer else "and no linear layer reads anything else"
    return NotTheModel(f"the graph isn't {what}: {cause}, {where}; {INSTEAD}")


def _first_difference(
    graph: ir.Model,
    path: Path,
    products: Mapping[str, ir.Node],
    expected: Mapping[str, Array],
    feeds: Feeds,
) -> str | None:
    """The first linear layer, in the order of the graph, that reads something else than `expected` says."""
    places = {module: node.inputs[0] for module, node in products.items() if module in expected}
    names = {
        module: value.name
        for module, value in places.items()
        if value is not None and value.name and value.producer() is not None
    }
    running = opened_graph(graph, path, frozenset(names.values()))
    values = next(running.run_chains([[feeds]], {}, frozenset(names.values())))[0]
    for module, name in names.items():
        found = values[name]
        if found.size != expected[module].size:
            return module
        if distance(expected[module].reshape(found.shape), found) > TOLERANCE:
            return module
    return None


@contextmanager
def _reading(model: Any, modules: Sequence[str]) -> Iterator[dict[str, Array]]:
    """What the linear layers called `modules` read, by module, filled as `model` runs while it lasts."""
    seen: dict[str, Array] = {}
    known = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}

    def note(name: str) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0].detach().float().numpy()

        return hook

    hooks = [
        known[inside].register_forward_pre_hook(note(name))
        for name in modules
        if (inside := _inside(name, known)) is not None
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _inside(module: str, known: Collection[str]) -> str | None:
    """What a module is called in the model in memory, where a checkpoint may leave a prefix out."""
    if module in known:
        return module
    ending = [name for name in known if name.endswith(f".{module}") or module.endswith(f".{name}")]
    return ending[0] if len(ending) == 1 else None
