"""A head that reads 16 bits: what its rows are, and that the graph comes nearer to the floats for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests import exported, tiny
from tests.heads import ENCODERS
from vera_edge.device.runtime import lookahead
from vera_edge.device.runtime.session import Session
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import target
from vera_edge_onnx.graph.weaver import Weaver
from vera_edge_onnx.weights.head_activations import two_rows

WIDTH, BLOCK = 64, 16
Make = Callable[..., Path]


def run_two_rows(x: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """x (batch, tokens, WIDTH) -> (batch, tokens, 2, WIDTH), in ONNX Runtime."""
    given = ir.Value(
        name="x", shape=ir.Shape(["batch", "tokens", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    end = ir.node("Identity", [given])
    end.outputs[0].name = "end"
    end.outputs[0].type = given.type
    graph = ir.Graph([given], [end.outputs[0]], nodes=[end], opset_imports={"": 21}, name="rows")
    model = ir.Model(graph, ir_version=10)
    rows = two_rows(Weaver(model), given, WIDTH, BLOCK, end)
    graph.outputs.append(rows)
    running = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    found: np.ndarray[Any, np.dtype[np.float32]] = running.run([rows.name], {"x": x})[0]
    return found


def test_the_rows_are_what_int8_holds_and_the_rest() -> None:
    x = np.random.default_rng(3).standard_normal((2, 5, WIDTH), np.float32)
    x[0, 1] = 0.0
    x[0, 2, :BLOCK] *= 1e-20
    x[1, 3, 7] = 3e4
    found = run_two_rows(x)
    assert found.shape == (2, 5, 2, WIDTH)
    rounded, rest = found[:, :, 0], found[:, :, 1]
    np.testing.assert_allclose(rounded + rest, x, rtol=0, atol=1e-6 * np.abs(x).max(-1, keepdims=True).max())
    blocks, parts = x.reshape(2, 5, -1, BLOCK), rounded.reshape(2, 5, -1, BLOCK)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    codes = np.divide(parts, scales, out=np.zeros_like(parts), where=scales > 0)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(codes).max() <= 127.001
    assert (np.abs(rest.reshape(parts.shape)) <= 0.501 * scales).all()


@pytest.fixture(scope="module")
def make(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(mode, weights, **options): an export of the tiny Llama, made once."""
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path_factory.mktemp("float") / "adapter")
    done: dict[str, Path] = {}

    def export(mode: str, weights: str, **options: str) -> Path:
        key = repr((mode, weights, options))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("export") / "out"
            target.export(
                tiny_llama.fp32,
                [(adapter, 1.0)],
                done[key],
                mode=mode,
                weights=weights,
                options=options,
            )
        return done[key]

    return export


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_what_rounding_the_heads_input_costs_is_gone(head: str, make: Make) -> None:
    ids = exported.tokens()
    exact = exported.logits(make("merged", "fp32", head=head, accuracy_level="0"), ids)
    plain = exported.logits(make("merged", "fp32", head=head), ids)
    fine = exported.logits(make("merged", "fp32", head=head, head_activations="int16"), ids)
    assert exported.error(plain, exact) > 1e-3
    assert exported.error(fine, exact) < exported.error(plain, exact) / 50


def test_it_runs_token_by_token_in_parts_and_with_tokens_ahead(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("branch", "int8", head_activations="int16")
    exported.assert_same_in_parts(folder, exported.tokens(20))
    monkeypatch.setattr(lookahead, "_cost", lambda *_: 0.0)
    running, prompt = Session.open(folder, threads=1), np.array([5, 6, 7, 8] * 5, np.int64)
    plain, ahead = (running.generate(prompt, max_tokens=24, speculate=count) for count in (0, 3))
    assert list(ahead) == list(plain)
    assert ahead.tokens == plain.tokens
    assert ahead.summary()["speculation"]["fed"] > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"head_activations": "fp32"}, "a head can't read 'fp32'; choose from int8, int16"),
        ({"head_activations": "int16", "accuracy_level": "0"}, "reads floats already; leave"),
        ({"head_activations": "int16", "head": "fp16"}, "stored as fp16 and reads floats; leave"),
    ],
)
def test_what_it_would_do_nothing_for_is_refused(options: dict[str, str], why: str, make: Make) -> None:
    with pytest.raises(PlanError, match=why):
        make("merged", "int8", **options)


def test_an_encoder_has_no_head(tmp_path: Path) -> None:
    base, adapter = next(iter(ENCODERS.values())).make(tmp_path)
    with pytest.raises(TargetError, match="no output head over the vocabulary"):
        target.export(
            base,
            [(adapter, 1.0)],
            tmp_path / "out",
            mode="merged",
            weights="int8",
            options={"head_activations": "int16"},
        )
