"""Graphs that leave out the logits of all but a prompt's last token."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import exported
from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime import last_logits
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.session import Session


def test_a_prompt_of_several_chunks_has_the_logits_of_its_last_token(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 7)
    ids = exported.tokens(24)
    for folder in (tiny_bundles.fp32, tiny_bundles.int4, tiny_bundles.branch):
        session = Session.open(folder, threads=1)
        expected = session.logits(ids)
        steps = Steps(session.decoder, session.decoder.cache(30), session.vectors)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(steps.prefill(ids), expected[-1], atol=2e-5 * scale)
        # What is fed afterwards gets all of its logits again.
        assert steps.feed(ids[None, :3]).shape == (1, 3, session.vocab_size)


def test_a_head_behind_no_norm_gives_all_and_prompts_take_the_last(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Session.open(tiny_bundles.int4, threads=1)
    monkeypatch.setattr(last_logits, "_NORMS", frozenset[str]())
    whole = Session.open(tiny_bundles.int4, threads=1)
    assert plain.decoder.cuts_logits and not whole.decoder.cuts_logits
    ids = exported.tokens(12)
    cut, last = (Steps(one.decoder, one.decoder.cache(12), {}).prefill(ids) for one in (plain, whole))
    np.testing.assert_allclose(cut, last, atol=1e-6 * np.abs(last).max())


def _model(nodes: list[onnx.NodeProto], opset: int = 21) -> bytes:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n", 4]) for name in ("x", "logits")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()
    return data


def _norm(inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node("LayerNormalization", inputs, [output])


def test_all_that_reads_the_last_norm_reads_what_is_cut() -> None:
    """As a head with a side-branch does; the norm before it is left alone."""
    nodes = [
        _norm(["x", "x"], "a"),
        helper.make_node("Abs", ["a"], ["b"]),
        _norm(["b", "b"], "h"),
        helper.make_node("Neg", ["h"], ["product"]),
        helper.make_node("Exp", ["h"], ["branch"]),
        helper.make_node("Add", ["product", "branch"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["logits"]),
    ]
    made = last_logits.rewrite(memoryview(_model(nodes)))
    assert made is not None
    graph = onnx.ModelProto.FromString(made).graph
    readers = {node.op_type: list(node.input) for node in graph.node}
    (cut,) = (node.output[0] for node in graph.node if node.op_type == "Slice")
    assert readers["Neg"] == readers["Exp"] == [cut]
    assert readers["Slice"][:2] == ["h", last_logits.FROM] and readers["Abs"] == ["a"]
    assert last_logits.FROM in [port.name for port in graph.input]


def test_a_norm_beside_a_residual_is_not_the_last() -> None:
    nodes = [
        helper.make_node("Abs", ["input_ids"], ["residual"]),
        _norm(["residual", "residual"], "h"),
        helper.make_node("Neg", ["h"], ["mlp"]),
        helper.make_node("Add", ["mlp", "residual"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["logits"]),
    ]
    assert last_logits.rewrite(memoryview(_model(nodes))) is None
    nodes[3] = helper.make_node("Add", ["mlp", "bias"], ["sum"])
    assert last_logits.rewrite(memoryview(_model(nodes))) is not None


@pytest.mark.parametrize("opset", [12, 21])
def test_what_it_cannot_rewrite_it_leaves(opset: int) -> None:
    nodes = [_norm(["x", "x"], "h") if opset < 13 else helper.make_node("Abs", ["x"], ["h"])]
    nodes.append(helper.make_node("Neg", ["h"], ["logits"]))
    assert last_logits.rewrite(memoryview(_model(nodes, opset))) is None
    with pytest.raises(ValueError):
        last_logits.rewrite(memoryview(b"\xff" * 40))
