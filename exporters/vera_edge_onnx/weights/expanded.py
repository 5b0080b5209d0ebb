"""Ships linear layers in 4 bits that the graph reads as int8 blocks: the device expands them at install.

`vera_edge.device.runtime.expansion` writes the blocks; what is shipped is a safetensors file in
bitsandbytes' layout, for a base that is stored so the checkpoint's own bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.device.runtime import expansion
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.formats import Bnb4Weight
from vera_edge.rounding.weight_rounding import BLOCK
from vera_edge.storage.files import output_error
from vera_edge.storage.tensors import RawTensor, write_header
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.weights import stored as weights
from vera_edge_onnx.weights.deferred import Deferred
from vera_edge_onnx.weights.linear import Blocks, StoredProduct, join_blocks

SHIPPED = "model.4bit.safetensors"
_KEPT = 8  # weights: those of a layer


@dataclass
class Shipped:
    """The weights that are shipped in 4 bits, by module, and the graph's weights that are made of them.

    weights: None where nothing is.
    """

    weights: FourBit | None = None
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def initializers(self) -> frozenset[str]:
        return frozenset(name for weight in self.sites for name in expansion.names(weight))

    def write(self, path: Path) -> None:
        """The shipped weights as safetensors, sorted by name. Raises OutputError when the disk refuses."""
        assert self.weights is not None
        layout = {
            f"{module}{suffix}": entry
            for module in sorted(self.weights.modules)
            for suffix, entry in sorted(self.weights.layout(module).items())
        }
        try:
            with path.open("wb") as stream:
                write_header(stream, layout, {})
                for name in layout:
                    self.weights.write(name, stream)
        except OSError as cause:
            raise output_error(path, cause) from cause

    def entry(self, model: ir.Model, source: str) -> dict[str, Any]:
        """How the manifest says to make the graph's weights, after the graph was saved."""
        found = {}
        for weight, site in sorted(self.sites.items()):
            codes, scales = (_offset(model, name) for name in expansion.names(weight))
            rows = [[part.module, part.start, part.stop] for part in site.parts]
            found[weight] = {"rows": rows, "codes": codes, "scales": scales}
        return {"source": source, "block": BLOCK, "weights": found}


class FourBit:
    """The 4-bit weights of modules, made when they're asked for; the last few are kept.

    Their tensors are kept too, in `spool` where there is one, until they're written.
    """

    def __init__(self, request: ExportRequest, sites: Sequence[Site], spool: Spool | None) -> None:
        self._request, self._spool = request, spool
        self._steps = {step.module: step for step in request.plan.steps}
        self._parts: dict[str, list[tuple[int, Site]]] = {}
        for site in sites:
            for part in site.parts:
                self._parts.setdefault(part.module, []).append((part.start, site))
        self._last: dict[str, Bnb4Weight] = {}
        self._tensors: dict[str, RawTensor] = {}
        self._layouts: dict[str, Mapping[str, tuple[str, tuple[int, ...]]]] = {}

    @property
    def modules(self) -> Collection[str]:
        return self._parts.keys()

    def get(self, module: str) -> Bnb4Weight:
        """One module's weight."""
        if module not in self._last:
            made = self._make(module)
            while len(self._last) >= _KEPT:
                self._last.pop(next(iter(self._last)))
            self._last[module] = made
            self._keep(module, made)
        return self._last[module]

    def _make(self, module: str) -> Bnb4Weight:
        def rows() -> Float32:
            found = [
                (part.start, values())
                for site in dict.fromkeys(site for _, site in self._parts[module])
                for part, values in weights.rows_of(site)
                if part.module == module
            ]
            return np.concatenate([values for _, values in sorted(found, key=lambda pair: pair[0])])

        return weights.four_bit(self._request, self._steps[module], rows)

    def _keep(self, module: str, made: Bnb4Weight) -> None:
        tensors = made.tensors()
        self._layouts[module] = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in tensors.items()}
        for suffix, tensor in tensors.items():
            name = f"{module}{suffix}"
            if self._spool is None:
                self._tensors[name] = tensor
            else:
                self._spool.keep(f"{SHIPPED}/{name}", tensor.data)
        if self._spool is not None:
            layout = {
                suffix: [dtype, list(shape)] for suffix, (dtype, shape) in self._layouts[module].items()
            }
            self._spool.note(f"{SHIPPED}/{module}", layout)

    def layout(self, module: str) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of a module's tensors, by suffix; makes them where they aren't kept."""
        if module not in self._layouts:
            spool, key = self._spool, f"{SHIPPED}/{module}"
            noted = spool.noted(key) if spool is not None else None
            if spool is not None and noted and spool.has(f"{key}{suffix}" for suffix in noted):
                return {suffix: (dtype, tuple(shape)) for suffix, (dtype, shape) in noted.items()}
            self._keep(module, self._make(module))
        return self._layouts[module]

    def write(self, name: str, stream: BinaryIO) -> None:
        """Write a kept tensor's bytes, which are kept no longer then."""
        if self._spool is None:
            stream.write(self._tensors.pop(name).data.tobytes())
        else:
            self._spool.take(f"{SHIPPED}/{name}", stream)


def ship(
    request: ExportRequest,
    sites: Sequence[Site],
    stored: dict[str, StoredProduct],
    spool: Spool | None = None,
) -> Shipped:
    """Add int8 blocks to `stored` (by site name) where a weight is shipped in 4 bits; what they are of.

    Nothing where the weights run as what is shipped. spool: where weights lie until they're written.
    """
    if weights.runs_as(request) == weights.kind(request.plan):
        return Shipped()
    steps = {step.module: step for step in request.plan.steps}
    chosen = [site for site in sites if weights.is_four_bit(site, steps)]
    shipped = Shipped(FourBit(request, chosen, spool))
    for done, site in enumerate(chosen):
        stored[site.name] = Deferred(partial(_expanded, request, shipped, site, done, len(chosen)))
        shipped.sites[site.weight_name] = site
    return shipped


def _expanded(request: ExportRequest, shipped: Shipped, site: Site, done: int, count: int) -> StoredProduct:
    request.progress("expanding the weights", done, count)
    assert shipped.weights is not None
    return join_blocks(
        [
            Blocks(expansion.blocks(shipped.weights.get(part.module), part.start, part.stop, BLOCK))
            for part in site.parts
        ]
    )


def _offset(model: ir.Model, name: str) -> int:
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    return tensor.offset
