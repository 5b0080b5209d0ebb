"""Which side-branches are computed together, and where the graph takes each module's vectors from."""

from __future__ import annotations

import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from vera_edge_onnx.graph import groups
from vera_edge_onnx.graph.parts import Part
from vera_edge_onnx.graph.sites import Site


def site(name: str, x: ir.Value, *parts: Part) -> Site:
    return Site(name, ir.node("MatMul", [x, ir.Value(name="w")], name=f"{name}/MatMul"), parts, 64)


def named(sites: list[Site], sizes: dict[str, int]) -> dict[str, bool]:
    return {group.name: group.stacked for group in groups.groups(sites, sizes)}


X, Y = ir.Value(name="x"), ir.Value(name="y")


def test_whole_modules_of_one_size_that_read_the_same_input_are_stacked() -> None:
    sizes = {"gate": 160, "up": 160, "down": 64, "q": 64, "k": 32, "v": 32}
    gate, up = site("/mlp/gate", X, Part("gate", 0, 160)), site("/mlp/up", X, Part("up", 0, 160))
    down, other = site("/mlp/down", Y, Part("down", 0, 64)), site("/mlp/up", Y, Part("up", 0, 160))
    assert named([gate, up, down], sizes) == {"/mlp/gate+up": True, "/mlp/down": False}
    assert named([gate, other], sizes) == {"/mlp/gate": False, "/mlp/up": False}
    qkv = site("/attn/qkv", X, Part("q", 0, 64), Part("k", 0, 32), Part("v", 0, 32))
    assert named([qkv], sizes) == {"/attn/qkv": False}
    assert named([qkv], sizes | {"q": 32}) == {"/attn/qkv": False}  # then q isn't whole
    kv = site("/attn/kv", X, Part("k", 0, 32), Part("v", 0, 32))
    assert named([kv], sizes) == {"/attn/kv": True}
    assert named([gate, up], {"gate": 160}) == {"/mlp/gate": False}


def test_halves_of_one_module_are_not_stacked() -> None:
    """Phi-3's checkpoint packs gate and up: B's second half of rows is another matrix than its first."""
    halves = [site("/gate", X, Part("m", 0, 80)), site("/up", X, Part("m", 80, 160))]
    assert named(halves, {"m": 160}) == {"/gate": False, "/up": False}
    assert groups.layout(halves, {"m": 160}) == (("m", 0, 80), ("m", 80, 160))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([32, 64]), st.booleans()), max_size=12))
def test_the_layout_has_every_row_of_every_adapted_module_once(
    drawn: list[tuple[bool, int, bool]],
) -> None:
    sites = [
        site(f"/{n}", X if first else Y, Part(str(n), 0, size)) for n, (first, size, _) in enumerate(drawn)
    ]
    sizes = {str(n): size for n, (_, size, adapted) in enumerate(drawn) if adapted}
    assert groups.layout(sites, sizes) == tuple((module, 0, size) for module, size in sizes.items())
    for group in groups.groups(sites, sizes):
        assert group.stacked == (len(group.sites) > 1)
        assert len({(one.input, one.out_features) for one in group.sites}) == 1
