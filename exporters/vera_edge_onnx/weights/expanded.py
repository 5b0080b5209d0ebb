"""Ships linear layers in 4 bits that the graph reads as int8 blocks: the device expands them at install.

`vera_edge.device.runtime.expansion` writes the blocks; what is shipped is a safetensors file in
bitsandbytes' layout, for a base that is stored so the checkpoint's own bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.device.runtime import expansion
from vera_edge.exporting.target import ExportRequest
from vera_edge.formats import Bnb4Weight
from vera_edge.rounding.weight_rounding import BLOCK
from vera_edge.storage.files import output_error
from vera_edge.storage.tensors import write_header
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.weights import stored as weights
from vera_edge_onnx.weights.linear import Blocks, StoredProduct, join_blocks

SHIPPED = "model.4bit.safetensors"


@dataclass
class Shipped:
    """The weights that are shipped in 4 bits, by module, and the graph's weights that are made of them."""

    modules: dict[str, Bnb4Weight] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def initializers(self) -> frozenset[str]:
        return frozenset(name for weight in self.sites for name in expansion.names(weight))

    def write(self, path: Path) -> None:
        """The shipped weights as safetensors, sorted by name. Raises OutputError when the disk refuses."""
        stored = {
            f"{module}{suffix}": tensor
            for module, weight in sorted(self.modules.items())
            for suffix, tensor in sorted(weight.tensors().items())
        }
        try:
            with path.open("wb") as stream:
                layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
                write_header(stream, layout, {})
                for tensor in stored.values():
                    stream.write(tensor.data.tobytes())
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


def ship(request: ExportRequest, sites: Sequence[Site], stored: dict[str, StoredProduct]) -> Shipped:
    """Add int8 blocks to `stored` (by site name) where a weight is shipped in 4 bits; what they are of.

    Nothing where the weights run as what is shipped.
    """
    if weights.runs_as(request) == weights.kind(request.plan):
        return Shipped()
    steps = {step.module: step for step in request.plan.steps}
    chosen = [site for site in sites if weights.is_four_bit(site, steps)]
    rows: dict[str, list[tuple[int, Float32]]] = {}
    for site in chosen:
        for part, values in weights.rows_of(site):
            rows.setdefault(part.module, []).append((part.start, values))
    shipped = Shipped()
    for module, parts in rows.items():
        whole = np.concatenate([values for _, values in sorted(parts, key=lambda pair: pair[0])])
        shipped.modules[module] = weights.four_bit(request, steps[module], whole)
    for done, site in enumerate(chosen):
        request.progress("expanding the weights", done, len(chosen))
        parts_of_site = [
            Blocks(expansion.blocks(shipped.modules[part.module], part.start, part.stop, BLOCK))
            for part in site.parts
        ]
        stored[site.name] = join_blocks(parts_of_site)
        shipped.sites[site.weight_name] = site
    return shipped


def _offset(model: ir.Model, name: str) -> int:
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    return tensor.offset
