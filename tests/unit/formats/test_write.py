"""The formats that can be written: what they promise, what they lose, and that twice is no more than once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vera_edge import formats
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.formats import bitpack, float8
from vera_edge.storage.tensors import write_header

MODULE = "model.layers.0.mlp.up_proj"
WRITABLE: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"group_size": 32}),
    ("gptq", {"group_size": -1, "bits": 3}),
    ("gptq", {"group_size": 32, "bits": 2, "sym": False}),
    ("gptq", {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}),
    ("gptq8", {"group_size": 64}),
    ("gptq8", {"group_size": 64, "sym": False}),
    ("awq", {"group_size": 32}),
    ("awq", {"group_size": -1}),
    ("w4a16", {"group_size": 32}),
    ("compressed-tensors", {"preset": "W4A16_ASYM", "group_size": 32}),
    ("w8a16", {"group_size": 64}),
    ("w8a8", {}),
    ("fp8-dynamic", {}),
    ("fp8", {}),
    ("fp8", {"block": [16, 32]}),
    ("fp8", {"block": None}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in WRITABLE]


def _weights(shape: tuple[int, int] = (32, 64)) -> st.SearchStrategy[Float32]:
    """Weights whose magnitudes differ much, with groups of zeros, of one sign, of one value."""
    size = st.floats(2**-6, 8, width=32)
    values = st.one_of(size, size.map(lambda x: -x), st.just(0.0))
    return hnp.arrays(np.float32, shape, elements=values, fill=st.one_of(st.just(0.0), values))


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as stream:
        write_header(
            stream, {name: (raw.dtype, raw.shape) for name, raw in tensors.items()}, {"format": "pt"}
        )
        for raw in tensors.values():
            stream.write(raw.data.tobytes())


@pytest.mark.parametrize(("name", "given_options"), WRITABLE, ids=IDS)
@given(weight=_weights())
@settings(max_examples=15, deadline=None)
def test_quantizing_what_was_quantized_gives_the_same_bytes(
    name: str, given_options: dict[str, Any], weight: Float32
) -> None:
    weight_format = formats.get(name)
    options = weight_format.options(given_options)
    once = weight_format.quantize(weight, options)
    twice = weight_format.quantize(formats.dequantize(once), options)
    for suffix, raw in once.tensors().items():
        np.testing.assert_array_equal(twice.tensors()[suffix].data, raw.data, err_msg=suffix)


@pytest.mark.parametrize(("name", "given_options"), WRITABLE, ids=IDS)
def test_what_is_written_is_as_announced_and_reads_back(
    name: str, given_options: dict[str, Any], tmp_path: Path
) -> None:
    weight = np.random.default_rng(3).normal(0, 0.1, (64, 128)).astype(np.float32)
    weight_format = formats.get(name)
    options = weight_format.options(given_options)
    written = weight_format.quantize(weight, options)
    tensors = written.tensors()
    assert {key: (raw.dtype, raw.shape) for key, raw in tensors.items()} == dict(
        weight_format.layout((64, 128), options)
    )
    config = {"model_type": "llama", "quantization_config": weight_format.quantization_config(options)}
    _write(tmp_path / "base", config, {f"{MODULE}{key}": raw for key, raw in tensors.items()})
    checkpoint = Checkpoint.open(tmp_path / "base")
    values = checkpoint.dequantize(MODULE)
    np.testing.assert_array_equal(values, formats.dequantize(written))
    # written again as it is stored
    linear = checkpoint.linears[MODULE]
    again = formats.get(linear.format).quantize(values, formats.get(linear.format).options_of(linear))
    assert {key: raw.data.tobytes() for key, raw in again.tensors().items()} == {
        key: raw.data.tobytes() for key, raw in tensors.items()
    }


@pytest.mark.parametrize(("name", "given_options"), WRITABLE, ids=IDS)
def test_no_value_moves_by_more_than_half_a_step(name: str, given_options: dict[str, Any]) -> None:
    weight = np.random.default_rng(4).normal(0, 0.1, (64, 128)).astype(np.float32)
    weight_format = formats.get(name)
    values = formats.dequantize(weight_format.quantize(weight, weight_format.options(given_options)))
    if name.startswith("fp8"):  # three mantissa bits, or half a subnormal step
        allowed = np.maximum(np.abs(weight) * 2**-4, np.abs(weight).max() / 448 * 2**-10) * 1.001
        assert (np.abs(values - weight) <= allowed).all()
        return
    bits = {"gptq8": 8, "w8a16": 8, "w8a8": 8}.get(name, given_options.get("bits", 4))
    size = given_options.get("group_size", -1)
    groups = weight.reshape(64, -1, weight.shape[1] if size == -1 else size)
    symmetric = given_options.get("sym", "ASYM" not in str(given_options) and name != "awq")
    span = 2 * np.abs(groups).max(2) / (2**bits - 2) if symmetric else np.ptp(groups, 2) / (2**bits - 2)
    # rounding the zero point moves the ends of an asymmetric grid by half a step more
    error = np.abs(values - weight).reshape(groups.shape).max(2)
    assert (error <= span * (0.501 if symmetric else 1.01)).all()


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16", "w8a8", "fp8", "fp8-dynamic"])
def test_what_is_not_finite_is_refused(name: str) -> None:
    weight = np.zeros((32, 128), np.float32)
    weight[3, 4] = np.inf
    weight_format = formats.get(name)
    with pytest.raises(PlanError, match="NaN or infinite"):
        weight_format.quantize(weight, weight_format.options({}))


@pytest.mark.parametrize(
    ("name", "given_options", "shape", "message"),
    [
        ("gptq", {}, (32, 96), "a group size of 128 doesn't divide its 96 inputs"),
        ("gptq", {"group_size": 20}, (40, 100), "both sides must be multiples of 32"),
        ("gptq", {"bits": 5}, None, "has 2, 3, 4 or 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format gptq or gptq_v2"),
        ("gptq", {"group": 3}, None, "takes no option 'group'"),
        ("gptq", {"group_size": "32"}, None, "is '32' where int belongs"),
        ("gptq", {"group_size": 0}, (32, 64), "isn't a positive number or -1"),
        ("awq", {"group_size": 32}, (36, 64), "its outputs must be a multiple of 8"),
        ("w4a16", {"preset": "W3A16"}, None, "is written as W4A16"),
        ("w4a16", {"group_size": 48}, (32, 64), "a group size of 48 doesn't divide"),
        ("fp8", {"block": [0, 1]}, None, "give two positive numbers"),
        ("hqq", {}, None, "reads hqq and doesn't write it"),
        ("torchao", {}, None, "reads torchao and doesn't write it"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_weight_is_read(
    name: str, given_options: dict[str, Any], shape: tuple[int, int] | None, message: str
) -> None:
    weight_format = formats.get(name)
    with pytest.raises(PlanError, match=message):
        weight_format.layout(shape or (128, 128), weight_format.options(given_options))


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_packed_codes_unpack(bits: int, count: int, rows: int, random: Any) -> None:
    codes = np.array([[random.randrange(1 << bits) for _ in range(count)] for _ in range(rows)], np.uint8)
    packed = bitpack.pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 32))
    np.testing.assert_array_equal(bitpack.unpack(packed, bits, count), codes)
    # the first code is in the lowest bits
    assert int(packed[0, 0]) & ((1 << bits) - 1) == codes[0, 0]


def test_float8_codes_are_torchs() -> None:
    import torch

    codes = np.arange(256, dtype=np.uint8)
    for dtype, kind in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        theirs = torch.from_numpy(codes).view(kind).float().numpy()
        np.testing.assert_array_equal(float8.decode(codes, dtype), theirs)


@given(hnp.arrays(np.float32, 64, elements=st.floats(-448, 448, width=32)))
@settings(deadline=None)
def test_float8_rounding_is_torchs(values: Float32) -> None:
    import torch

    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(float8.encode(values), theirs)
