"""Stored weights as ONNX Runtime multiplies with them, and edits of a graph, each in a graph of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vera_edge.adapters.projection import Projections, ProjectionSpec, regenerate
from vera_edge.errors import PlanError, TargetError
from vera_edge.formats import get
from vera_edge.formats.blocks import quantize
from vera_edge_onnx.branch.projections import StoredProjections
from vera_edge_onnx.graph import storage
from vera_edge_onnx.graph.weaver import Range, Weaver
from vera_edge_onnx.weights.linear import (
    Blocks,
    Bnb4Product,
    StoredProduct,
    join_blocks,
    join_bnb4,
    pack_bits,
)

Float32 = npt.NDArray[np.float32]


def graph(width: int, *, out: int) -> tuple[Weaver, ir.Value, ir.Node]:
    """A graph with one input (rows, width), and a node to insert others before."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", width]), type=ir.TensorType(ir.DataType.FLOAT))
    end = ir.node("Identity", [x], name="end")
    end.outputs[0].name = "y"
    end.outputs[0].shape = ir.Shape(["rows", out])
    end.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 22, "com.microsoft": 1}
    made = ir.Graph([x], [end.outputs[0]], nodes=[end], opset_imports=opsets, name="test")
    return Weaver(ir.Model(made, ir_version=10)), x, end


def run(weaver: Weaver, value: ir.Value, end: ir.Node, folder: Path, x: Float32) -> Float32:
    end.replace_input_with(0, value)
    path = folder / "onnx" / "model.onnx"
    storage.save(weaver.model, path, weaver.finish())
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Float32 = session.run(None, {"x": x})[0]
    return found


def apply(linear: StoredProduct, folder: Path, x: Float32, out: int) -> Float32:
    weaver, value, end = graph(x.shape[1], out=out)
    return run(weaver, linear.product(weaver, value, "w", "/w", end), end, folder, x)


def rounding(x: Float32, weight: Float32) -> Float32:
    """What rounding the rows of x to int8 may move x @ weight.T by, (rows, out), on whatever processor.

    Each x is off by half a step at most, evenly spread: four standard deviations of the sum over a row.
    Kernels that take shorter steps (one for each block of x), or none, are off by less.
    """
    steps = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    sums = np.abs(x) @ np.abs(weight.T)  # of magnitudes, for the roundings of float32
    found: Float32 = 4 / np.sqrt(12) * steps * np.linalg.norm(weight, axis=1) + 1e-5 * sums
    return found


def drawn(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(st.sampled_from([2, 4, 8]), hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 37))))
def test_packed_codes_lie_low_bits_first(bits: int, codes: npt.NDArray[np.uint8]) -> None:
    codes &= (1 << bits) - 1
    packed = pack_bits(codes, bits)
    share = 8 // bits
    for row, source in zip(packed, codes, strict=True):
        for place, code in enumerate(source):
            assert (int(row[place // share]) >> (place % share * bits)) & ((1 << bits) - 1) == code


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("width", "block"), [(128, 32), (80, 32), (96, 16), (40, 64), (256, 128), (300, 256)]
)
def test_blocks_multiply_as_they_dequantize(
    bits: int, symmetric: bool, width: int, block: int, tmp_path: Path
) -> None:
    form = quantize(drawn(24, width), bits, block, symmetric)
    assert (form.scales < 0).any() == symmetric  # the end with one code more is the largest weight's
    x = drawn(3, width, seed=1)
    weight = form.dequantize()
    found = apply(Blocks(form), tmp_path, x, 24)
    assert (np.abs(found - x @ weight.T) < rounding(x, weight)).all()


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (8, 128), (4, 32), (4, 64), (2, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_blocks_at_the_ends_of_their_ranges_overflow_nowhere(
    bits: int, block: int, symmetric: bool, rows: int, tmp_path: Path
) -> None:
    """Most codes and most of x are the greatest there are, where sums of 16 bits would show."""
    draw = np.random.default_rng(bits)
    x, weight = (
        draw.choice(np.array([-1.0, 0.25, 1.0], np.float32), size, p=[0.1, 0.2, 0.7])
        for size in ((rows, 256), (24, 256))
    )
    form = quantize(weight, bits, block, symmetric)
    found, weight = apply(Blocks(form), tmp_path, x, 24), form.dequantize()
    assert (np.abs(found - x @ weight.T) < rounding(x, weight)).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_multiply_as_they_dequantize(kind: str, tmp_path: Path) -> None:
    form = get(kind)
    made: Any = form.quantize(drawn(24, 96), form.options({}))
    linear = Bnb4Product(made.shape, kind, made.blocksize, made.packed, made.absmax)
    x = drawn(3, 96, seed=1)
    truth = x @ made.rows(0, 24).T
    assert np.abs(apply(linear, tmp_path, x, 24) - truth).max() < 1e-5 * np.abs(truth).max()


def bnb4(rows: int, width: int, blocksize: int = 64, seed: int = 0) -> tuple[Bnb4Product, Float32]:
    form = get("nf4")
    made: Any = form.quantize(drawn(rows, width, seed=seed), form.options({"blocksize": blocksize}))
    return Bnb4Product(made.shape, "nf4", made.blocksize, made.packed, made.absmax), made.rows(0, rows)


def test_joined_and_cut_four_bit_weights(tmp_path: Path) -> None:
    (first, one), (second, two) = bnb4(8, 64), bnb4(16, 64, seed=2)
    joined, x = join_bnb4([first, second]), drawn(2, 64, seed=3)
    truth = x @ np.concatenate([one, two]).T
    assert np.abs(apply(joined, tmp_path / "joined", x, 24) - truth).max() < 1e-4
    cut = joined.rows(4, 20)
    assert np.abs(apply(cut, tmp_path / "cut", x, 16) - truth[:, 4:20]).max() < 1e-4


def test_four_bit_weights_that_do_not_fit() -> None:
    with pytest.raises(TargetError, match="doesn't end at a block of 64"):
        join_bnb4([bnb4(3, 32)[0], bnb4(2, 32)[0]])
    with pytest.raises(TargetError, match="differ in their 4-bit block size"):
        join_bnb4([bnb4(4, 64)[0], bnb4(4, 64, blocksize=128)[0]])
    with pytest.raises(TargetError, match="can't be cut out byte for byte"):
        bnb4(4, 96)[0].rows(1, 2)
    for odd in (8, 24, 100):
        with pytest.raises(TargetError, match=f"these are of {odd}"):
            Bnb4Product((2, 96), "nf4", odd, np.zeros(96, np.uint8), np.zeros(1, np.float32))


def test_joined_blocks(tmp_path: Path) -> None:
    parts = [quantize(drawn(rows, 64, seed=rows), 4, 32, symmetric=False) for rows in (8, 16)]
    x = drawn(2, 64, seed=5)
    weight = np.concatenate([part.dequantize() for part in parts])
    found = apply(join_blocks([Blocks(part) for part in parts]), tmp_path, x, 24)
    assert (np.abs(found - x @ weight.T) < rounding(x, weight)).all()


PROJECTIONS: Projections = regenerate(ProjectionSpec(seed=1, rank=16, in_max=160, out_max=96))


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("width", [64, 96, 160])
@pytest.mark.parametrize("rows", [(0, 96), (0, 32), (32, 96)])
def test_projections_give_their_first_columns_and_rows(
    dtype: str, limit: float, width: int, rows: tuple[int, int], tmp_path: Path
) -> None:
    weaver, value, end = graph(width, out=rows[1] - rows[0])
    stored = StoredProjections(PROJECTIONS, dtype, 160)
    down = stored.down(weaver, value, width, "/a", end)
    up = stored.up(weaver, down, rows, "/b", end)
    x = drawn(3, width)
    truth = x @ PROJECTIONS.a[:, :width].T @ PROJECTIONS.b[rows[0] : rows[1]].T
    assert np.abs(run(weaver, up, end, tmp_path, x) - truth).max() < limit * np.abs(truth).max()


def test_projections_of_an_unknown_dtype_are_refused() -> None:
    with pytest.raises(PlanError, match="choose from fp32, fp16, int8, int4"):
        StoredProjections(PROJECTIONS, "int2", 64)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 10)).map(lambda pair: (pair[0], min(10, sum(pair)))),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_ranges_of_rows_share_bytes_and_keep_their_values(ranges: list[tuple[int, int]]) -> None:
    weaver, _, end = graph(4, out=4)
    matrix = np.arange(40, dtype=np.float32).reshape(10, 4)
    for rows in ranges:
        value = weaver.rows("m", matrix, rows)
        weaver.model.graph.insert_before(end, ir.node("Identity", [value], name=f"keep{rows}"))
        weaver.model.graph.outputs.append(weaver.model.graph[-2].outputs[0])
    shared = weaver.finish()
    for start, stop in ranges:
        place = shared.get(f"m[{start}:{stop}]", Range(f"m[{start}:{stop}]"))
        assert place.source not in shared
        source = weaver.model.graph.initializers[place.source].const_value
        assert source is not None
        begin = place.offset // 16
        np.testing.assert_array_equal(source.numpy()[begin : begin + stop - start], matrix[start:stop])


def test_a_name_that_is_taken_is_refused() -> None:
    weaver, _, _ = graph(4, out=4)
    weaver.initializer("m.lambda_b", np.zeros(3, np.float32))
    with pytest.raises(TargetError, match=r"called m\.lambda_b already"):
        weaver.overridable("m.lambda_b", np.zeros(3, np.float32))
