"""Which side-branches are computed together, and in which order the graph takes their vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vera_edge.exporting.branch_inputs import Piece
from vera_edge_onnx.graph.parts import Part
from vera_edge_onnx.graph.sites import Site


@dataclass(frozen=True)
class Group:
    """Sites whose side-branches are computed together: they read the same x, and lie next to each other.

    stacked: all parts are whole modules of one size, so that one product with B serves them, a row for each.
    """

    sites: tuple[Site, ...]
    stacked: bool

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for site in self.sites for part in site.parts)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.module for part in self.parts))

    @property
    def name(self) -> str:
        """The site's name, or "/model/layers.0/mlp/gate_proj+up_proj"."""
        return joined_name(self.sites)

    @property
    def node(self) -> ir.Node:
        """The first node that the branch has to come before."""
        return self.sites[0].node

    @property
    def width(self) -> int:
        return sum(site.out_features for site in self.sites)


def joined_name(sites: Sequence[Site]) -> str:
    """The name of sites side by side."""
    return "+".join([sites[0].name, *(site.name.rsplit("/", 1)[-1] for site in sites[1:])])


def groups(sites: Sequence[Site], sizes: Mapping[str, int]) -> tuple[Group, ...]:
    """The sites of adapted modules, in the graph's order. sizes: adapted module -> output features."""
    found: list[Group] = []
    for site in sites:
        if not any(part.module in sizes for part in site.parts):
            continue
        last = found[-1] if found else None
        if last is not None and last.sites[0].input is site.input:
            joined = (*last.sites, site)
            if _stackable(joined, sizes):
                found[-1] = Group(joined, True)
                continue
        found.append(Group((site,), _stackable((site,), sizes)))
    return tuple(found)


def layout(sites: Sequence[Site], sizes: Mapping[str, int]) -> tuple[Piece, ...]:
    """The pieces of lambda_b in the order in which the graph takes them."""
    parts = (part for group in groups(sites, sizes) for part in group.parts)
    return tuple((part.module, part.start, part.stop) for part in parts)


def _stackable(sites: Sequence[Site], sizes: Mapping[str, int]) -> bool:
    parts = [part for site in sites for part in site.parts]
    whole = {(part.start, part.stop - sizes.get(part.module, -1), part.size) for part in parts}
    return len(parts) > 1 and whole == {(0, 0, parts[0].size)}
