"""Which product of a graph holds which rows of which module: told by content, however they are packed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_edge.errors import TargetError
from vera_edge_onnx.graph import sites
from vera_edge_onnx.graph.parts import Part

Float32 = npt.NDArray[np.float32]


def model(weights: Mapping[str, Float32]) -> ir.Model:
    """A graph with one MatMul for each named weight (in, out)."""
    nodes, initializers = [], []
    x = ir.Value(name="x", shape=ir.Shape([None, None]), type=ir.TensorType(ir.DataType.FLOAT))
    for name, weight in weights.items():
        value = ir.Value(name=f"{name}.weight", const_value=ir.tensor(np.ascontiguousarray(weight)))
        initializers.append(value)
        nodes.append(ir.node("MatMul", [x, value], name=f"{name}/MatMul"))
    outputs = [node.outputs[0] for node in nodes]
    made = ir.Graph([x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 22}, name="test")
    return ir.Model(made, ir_version=10)


def find(weights: Mapping[str, Float32], modules: Mapping[str, Float32]) -> dict[str, tuple[Part, ...]]:
    shapes = {name: (values.shape[0], values.shape[1]) for name, values in modules.items()}
    found = sites.find(model(weights), shapes, lambda module: modules[module])
    return {site.name: site.parts for site in found}


def drawn(out: int, inside: int, seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((out, inside)).astype(np.float32)


@given(st.permutations(["q", "k", "v"]), st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_packing_of_pieces_is_told(order: list[str], out: int, inside: int, data: st.DataObject) -> None:
    modules = {f"model.layers.3.attn.{name}": drawn(out, inside, seed) for seed, name in enumerate("qkv")}
    pieces: list[tuple[str, int, int]] = []
    for name in order:
        cut = data.draw(st.integers(0, out))
        module = f"model.layers.3.attn.{name}"
        # The later rows first, so that two pieces of a module never look like one.
        pieces += [(module, cut, out), (module, 0, cut)]
    pieces = [piece for piece in pieces if piece[1] < piece[2]]
    weight = np.concatenate([modules[module][start:stop] for module, start, stop in pieces]).T
    found = find({"/model/layers.3/attn/qkv": weight}, modules)
    assert found["/model/layers.3/attn/qkv"] == tuple(Part(*piece) for piece in pieces)


def test_equal_rows_are_told_apart_by_their_neighbours() -> None:
    first, second = drawn(4, 6, 0), drawn(4, 6, 1)
    first[2] = second[1] = 0.0
    modules = {"layers.0.a": first, "layers.0.b": second}
    found = find({"/layers.0/ab": np.concatenate([second, first]).T}, modules)
    assert found == {"/layers.0/ab": (Part("layers.0.b", 0, 4), Part("layers.0.a", 0, 4))}


def test_equal_weights_are_told_apart_by_their_names() -> None:
    """Tied ones, and those that begin as zeros: no two products are one module's, whatever their order."""
    same, zero = drawn(4, 6, 0), np.zeros((4, 6), np.float32)
    for weight in (same, zero):
        modules = {f"layers.0.attn.{name}_proj": weight.copy() for name in ("k", "o", "q", "v")}
        nodes = {f"/layers.0/attn/{name}_proj": weight.T for name in ("v", "q", "k", "o")}
        assert find(nodes, modules) == {
            node: (Part(f"layers.0.attn.{node.rpartition('/')[2]}", 0, 4),) for node in nodes
        }


def test_equal_weights_in_one_product_are_in_the_order_of_their_kind() -> None:
    zero = np.zeros((8, 6), np.float32)
    modules = {"layers.0.k_proj": zero[:4], "layers.0.q_proj": zero, "layers.0.v_proj": zero[:4].copy()}
    found = find({"/layers.0/qkv": np.zeros((6, 16), np.float32)}, modules)
    parts = (Part("layers.0.q_proj", 0, 8), Part("layers.0.k_proj", 0, 4), Part("layers.0.v_proj", 0, 4))
    assert found == {"/layers.0/qkv": parts}


@given(st.lists(st.integers(0, 2), min_size=6, max_size=12), st.permutations("qkv"))
def test_every_row_is_told_once_however_many_are_equal(kinds: list[int], order: list[str]) -> None:
    """Rows of three kinds only, zeros among them, in three products."""
    kind = np.stack([np.zeros(6, np.float32), *drawn(2, 6, 0)])
    modules = {
        f"layers.0.{name}_proj": kind[np.roll(kinds, turn)] for turn, name in enumerate(("q", "k", "v"))
    }
    found = find({f"/layers.0/{name}_proj": modules[f"layers.0.{name}_proj"].T for name in order}, modules)
    assert found == {f"/layers.0/{n}_proj": (Part(f"layers.0.{n}_proj", 0, len(kinds)),) for n in "qkv"}


def test_a_first_row_of_zeros_is_nobody_elses() -> None:
    first, second = drawn(4, 6, 0), drawn(4, 6, 1)
    first[0] = second[0] = 0.0
    modules = {"layers.0.a": first, "layers.0.b": second}
    found = find({"/layers.0/x": second.T, "/layers.0/y": first.T}, modules)
    assert found == {"/layers.0/x": (Part("layers.0.b", 0, 4),), "/layers.0/y": (Part("layers.0.a", 0, 4),)}


def test_a_layer_is_looked_up_among_its_own_modules() -> None:
    same = drawn(4, 6, 0)
    modules = {"h.0.a": same, "h.1.a": same.copy(), "head": drawn(3, 6, 1)}
    found = find({"/m/layers.1/a": same.T, "/m/layers.0/a": same.T, "/head": modules["head"].T}, modules)
    assert found == {
        "/m/layers.1/a": (Part("h.1.a", 0, 4),),
        "/m/layers.0/a": (Part("h.0.a", 0, 4),),
        "/head": (Part("head", 0, 3),),
    }


def test_a_weight_that_was_changed_is_no_site() -> None:
    modules = {"layers.0.a": drawn(4, 6, 0)}
    changed = modules["layers.0.a"].copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float32(9))
    assert find({"/layers.0/a": changed.T}, modules) == {}


def test_what_is_adapted_must_be_there_whole_and_once() -> None:
    shapes = {"layers.0.a": (4, 6)}

    def site(*parts: Part) -> sites.Site:
        return sites.Site("/a", ir.node("MatMul", []), parts, 6)

    sites.check_covered([site(Part("layers.0.a", 2, 4)), site(Part("layers.0.a", 0, 2))], shapes, "adapted")
    for parts in (
        [],
        [Part("layers.0.a", 0, 3)],
        [Part("layers.0.a", 1, 4)],
        [Part("layers.0.a", 0, 4), Part("layers.0.a", 0, 4)],
        [Part("layers.0.a", 0, 1), Part("layers.0.a", 2, 4)],
    ):
        with pytest.raises(TargetError, match=r"layers\.0\.a is adapted, but isn't a plain matrix product"):
            sites.check_covered([site(part) for part in parts], shapes, "adapted")
