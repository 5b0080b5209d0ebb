"""Integer blocks against ONNX Runtime's own MatMulNBits and against their bounds."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import PlanError
from vera_edge.formats import blocks
from vera_edge.formats.blocks import IntBlocks


def random_weight(out: int, inside: int, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((out, inside)) * 0.05).astype(np.float32)


def pack(codes: Bytes, bits: int) -> Bytes:
    """The operator's packing: the first code in the lowest bits."""
    per_byte = 8 // bits
    groups = codes.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint32)
    shifts = np.arange(per_byte, dtype=np.uint32) * bits
    return (groups << shifts).sum(axis=-1).astype(np.uint8)


def run_operator(weight: IntBlocks, x: Float32) -> Float32:
    """x (n, in) through a one-node model."""
    out, count = weight.scales.shape
    inputs = ["x", "codes", "scales"]
    tensors = [
        helper.make_tensor(
            "codes",
            TensorProto.UINT8,
            (out, count, weight.block * weight.bits // 8),
            pack(weight.codes, weight.bits).tobytes(),
            raw=True,
        ),
        helper.make_tensor("scales", TensorProto.FLOAT, (out, count), weight.scales.tobytes(), raw=True),
    ]
    if weight.zero_points is not None:
        padded = np.zeros((out, -(-count * weight.bits // 8) * 8 // weight.bits), np.uint8)
        padded[:, :count] = weight.zero_points
        packed = pack(padded, weight.bits)
        inputs.append("zeros")
        tensors.append(
            helper.make_tensor("zeros", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True)
        )
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        domain="com.microsoft",
        K=weight.in_features,
        N=out,
        bits=weight.bits,
        block_size=weight.block,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (x.shape[0], out))],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inside", [64, 96])
def test_onnx_runtime_computes_the_same(bits: int, symmetric: bool, inside: int) -> None:
    weight = blocks.quantize(random_weight(48, inside), bits, 32, symmetric)
    x = random_weight(5, inside, seed=1)
    expected = x.astype(np.float64) @ weight.dequantize().T.astype(np.float64)
    assert np.abs(run_operator(weight, x) - expected).max() < 1e-5 * np.abs(expected).max()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 9),
    inside=st.integers(1, 90),
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    scale=st.floats(1e-20, 1e20),
)
def test_no_value_is_off_by_more_than_a_step(
    seed: int, out: int, inside: int, bits: int, block: int, symmetric: bool, scale: float
) -> None:
    values = random_weight(out, inside, seed) * np.float32(scale)
    weight = blocks.quantize(values, bits, block, symmetric)
    steps = np.repeat(np.abs(weight.scales), block, axis=1)[:, :inside]
    restored = weight.dequantize()
    error = np.abs(restored.astype(np.float64) - values)
    # Half a step, and another half where the code that is missing opposite the extreme, or a rounded zero
    # point, moves an end of the range. What bfloat16 takes off a scale is missing eight times there.
    rounded = 8 * 2**-8 if symmetric and bits == 4 else 0
    assert (error <= steps * (1 + rounded + 1e-5)).all()
    assert weight.shape == values.shape


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 4, 8]), inside=st.integers(1, 70))
def test_symmetric_values_come_back(seed: int, bits: int, inside: int) -> None:
    once = blocks.quantize(random_weight(6, inside, seed), bits, 32, True)
    twice = blocks.quantize(once.dequantize(), bits, 32, True)
    assert np.allclose(twice.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


def test_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        weight = blocks.quantize(np.zeros((3, 40), np.float32), 4, 16, symmetric)
        assert not weight.dequantize().any()


@pytest.mark.parametrize(("bits", "rtol"), [(2, 1e-6), (4, 2**-8), (8, 1e-6)])
def test_the_extreme_value_is_exact_when_symmetric(bits: int, rtol: float) -> None:
    """At 4 bits to half a step of bfloat16, which scales are in."""
    values = random_weight(8, 64)
    weight = blocks.quantize(values, bits, 64, True)
    rows, columns = np.arange(8), np.abs(values).argmax(axis=1)
    assert np.allclose(weight.dequantize()[rows, columns], values[rows, columns], rtol=rtol)


def test_symmetric_four_bits_have_scales_that_bfloat16_has() -> None:
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        scales = blocks.quantize(random_weight(8, 64), bits, 32, symmetric).scales
        assert (scales.view(np.uint32) & 0xFFFF == 0).all() == (bits == 4 and symmetric)


def test_bfloat16_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F7F0000, 4000, np.uint32)
    bits[:3] = 0, 0x3F808000, 0x3F818000  # ties
    values = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(blocks.in_bfloat16(values), expected)
    largest = np.array([np.finfo(np.float32).max], np.float32)
    assert np.isfinite(blocks.in_bfloat16(largest)).all()


@pytest.mark.parametrize(
    ("bits", "block", "value", "sentence"),
    [
        (3, 32, 0.0, "2, 4 or 8 bits"),
        (4, 8, 0.0, "choose from 16"),
        (4, 48, 0.0, "choose from 16"),
        (4, 32, np.nan, "NaN or infinite"),
        (4, 32, np.inf, "NaN or infinite"),
    ],
)
def test_refuses(bits: int, block: int, value: float, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        blocks.quantize(np.full((2, 64), value, np.float32), bits, block, True)
