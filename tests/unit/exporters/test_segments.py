"""A graph that runs in parts gives what it gives whole, and what differs is still named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.unit.exporters.test_decoder import family_base
from tests.unit.exporters.test_skeleton import computed_of
from vera_edge.errors import TargetError
from vera_edge.exporting import target
from vera_edge.reference.loading import config_of
from vera_edge_onnx.decoder import held, parity
from vera_edge_onnx.decoder.drawing import Drawing, draw
from vera_edge_onnx.graph import segments
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.parts import Part
from vera_edge_onnx.running import InParts, Whole, opened_graph

ALONE = 30_000  # bytes: the embeddings and the widest layers are parts of their own
LAYERS = 70_000  # bytes: some products to a part


def drawing_of(family: str, folder: Path) -> Drawing:
    base, adapter = family_base(family, folder)
    source = computed_of(base, adapter, folder / "computed")
    config = config_of(source)
    return draw(source, config, config.architectures[0], folder / "graph", True)


@pytest.mark.parametrize("most", [ALONE, LAYERS])
@pytest.mark.parametrize("family", ["phi3", "gemma3", "smollm3"])
def test_parts_give_what_the_whole_gives(
    family: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cache handed on, and the values between asked for."""
    drawing = drawing_of(family, tmp_path)
    between = next(node.outputs[0].name or "" for node in drawing.model.graph if node.op_type == "MatMul")
    path, names = drawing.folder / "compared.onnx", ["logits", between]
    whole = opened_graph(drawing.model, path, [between])
    monkeypatch.setattr(segments, "MOST", most)
    monkeypatch.setattr(segments, "_FED", 1000)
    parts = opened_graph(drawing.model, path, [between])
    assert isinstance(whole, Whole) and isinstance(parts, InParts)
    cut = segments.cut(drawing.model, drawing.folder, most, frozenset(names))
    assert len(cut) > 3
    for part in cut:
        if isinstance(part, segments.Nodes):
            assert sum(tensor.nbytes for tensor in part.fed.values()) <= most
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 40)
    chains = [parity._chain(whole.signature, tokens, pieces, {}) for pieces in ([40], [20, 3, 1, 16], [7])]
    caches = parity._caches(whole.signature)
    assert caches
    pairs = zip(whole.run_chains(chains, caches, names), parts.run_chains(chains, caches, names), strict=True)
    for one, other in pairs:
        for values, again in zip(one, other, strict=True):
            for name in names:
                np.testing.assert_allclose(again[name], values[name], rtol=1e-4, atol=1e-4)
    # What comes after the last value that is asked for isn't computed.
    assert len(segments.cut(drawing.model, drawing.folder, most, frozenset([between]))) < len(cut)
    (found,), (expected,) = (next(one.run_chains(chains[:1], {}, [between])) for one in (parts, whole))
    np.testing.assert_allclose(found[between], expected[between], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_the_first_layer_that_differs_is_named(
    mode: str, tiny_llama: tiny.TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads' rows of layer 1's v_proj are exchanged: o_proj is the first that reads anything else."""
    monkeypatch.setattr(segments, "MOST", ALONE)
    monkeypatch.setattr(held, "_AT_ONCE", 1000)
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    target.export(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "sound", mode=mode, weights="int8")
    put_in = held.hold

    def hold(request: object, drawing: Drawing, found: object) -> object:
        for value in drawing.model.graph.initializers.values():
            weight = value.const_value
            if isinstance(weight, ComputedWeight) and "layers.1.attn.qkv_proj" in (value.name or ""):
                *others, last = weight.parts
                halves = (Part(last.module, 16, 32), Part(last.module, 0, 16))
                value.const_value = ComputedWeight(weight.source, [*others, *halves], True, value.name)
        return put_in(request, drawing, found)  # type: ignore[arg-type]

    monkeypatch.setattr("vera_edge_onnx.decoder.export.held.hold", hold)
    with pytest.raises(TargetError, match=r"first in what model\.layers\.1\.self_attn\.o_proj reads"):
        target.export(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "out", mode=mode, weights="int8")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
