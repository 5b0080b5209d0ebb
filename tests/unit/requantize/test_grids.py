"""Grids and codes: what is on a grid stays, and the formats' own readers see the values that we mean."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vera_edge.arrays import Float32
from vera_edge.errors import DataError, PlanError
from vera_edge.formats import blocks
from vera_edge.formats.bnb4 import Bnb4
from vera_edge.requantize import Codes, Grid, bnb_grid, int8_rows, int_blocks, requantize
from vera_edge.requantize.grids import inverse, spread

GRIDS = {
    "nf4": bnb_grid("nf4", double_quant=False),
    "nf4-double": bnb_grid("nf4"),
    "fp4": bnb_grid("fp4", double_quant=False),
    "fp4-double": bnb_grid("fp4", blocksize=128),
    "int2": int_blocks(2, 16, symmetric=False),
    "int4": int_blocks(4, 32),
    "int4-asymmetric": int_blocks(4, 32, symmetric=False),
    "int8": int_blocks(8, 64),
    "int8-asymmetric": int_blocks(8, 32, symmetric=False),
    "int8-rows": int8_rows(),
}
ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def normal(out: int, inside: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((out, inside)).astype(np.float32) * np.float32(0.05)


def gram(inside: int, seed: int = 1) -> Float32:
    """Statistics of correlated inputs, some large."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(inside) + 0.2 * rng.standard_normal((inside, inside))
    inputs = rng.standard_normal((4 * inside, inside)) @ mixing * np.exp(rng.standard_normal(inside))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


@ALL
@pytest.mark.parametrize("inside", [128, 100])
@pytest.mark.parametrize("method", ["rtn", "search", "hqq", "gptq"])
def test_what_is_on_the_grid_stays(grid: Grid, inside: int, method: str) -> None:
    """Rounding the restored weight on the same scales gives the same codes."""
    codes = requantize(normal(24, inside), grid, method, gram(inside))
    restored = codes.dequantize()
    scales = codes.scales
    zeros = codes.zeros if codes.zeros is not None else np.full_like(scales, grid.middle)
    zero = spread(zeros.astype(np.float32), grid, codes.shape) if grid.integer else None
    scaled = restored * spread(inverse(scales), grid, codes.shape)
    again = grid.codes_of(grid.nearest(scaled, zero), zero)
    # FP4 has two codes for zero, which both mean it.
    assert (grid.levels_of(again, zero) == grid.levels_of(codes.codes, zero)).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(48, 128), (7, 100), (5, 3)])
def test_bitsandbytes_restores_exactly_what_the_codes_mean(
    quant_type: str, double: bool, shape: tuple[int, int]
) -> None:
    grid = bnb_grid(quant_type, double_quant=double)
    codes = requantize(normal(*shape), grid, "gptq", gram(shape[1]))
    stored = {suffix.removeprefix(".weight"): raw for suffix, raw in codes.bnb4().tensors().items()}
    state = {name: torch.from_numpy(raw.array().copy()) for name, raw in stored.items()}
    packed = state.pop("")
    quant_state = bnb.QuantState.from_dict(
        {f"weight{name}": tensor for name, tensor in state.items()}, device=torch.device("cpu")
    )
    theirs = bnb.dequantize_4bit(packed, quant_state).numpy()
    assert (theirs == codes.dequantize()).all()


def test_bitsandbytes_restores_int8_rows() -> None:
    codes = requantize(normal(24, 100), int8_rows(), "gptq", gram(100))
    weight = codes.bnb8()
    theirs = bnb.int8_vectorwise_dequant(torch.from_numpy(weight.codes), torch.from_numpy(weight.scales))
    assert weight.codes.min() >= -127
    np.testing.assert_allclose(theirs.numpy(), codes.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounding_is_the_format_modules_own(quant_type: str, double: bool) -> None:
    """Two independent ways to the same codes, but for values within a table cell of a bound."""
    weight = normal(64, 256)
    form = Bnb4(quant_type)
    theirs = form.quantize(weight, form.options({"double_quant": double})).rows(0, 64)
    ours = requantize(weight, bnb_grid(quant_type, double_quant=double), "rtn").dequantize()
    assert (theirs == ours).mean() > (0.98 if double else 0.9995)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integer_blocks_round_as_the_format_module_does(bits: int, symmetric: bool) -> None:
    weight = normal(16, 100)
    theirs = blocks.quantize(weight, bits, 32, symmetric)
    ours = requantize(weight, int_blocks(bits, 32, symmetric), "rtn")
    np.testing.assert_allclose(ours.dequantize(), theirs.dequantize(), atol=1e-7)
    again = ours.int_blocks()
    assert (again.dequantize() == ours.dequantize()).all()
    assert again.codes.shape == theirs.codes.shape


@pytest.mark.parametrize("method", ["rtn", "search", "hqq", "gptq"])
def test_scales_are_in_bfloat16_before_weights_are_rounded(method: str) -> None:
    """Of symmetric 4 bits; so that what the weights make up for is what the scales have become."""
    weight, grid = normal(24, 96), int_blocks(4, 32)
    codes = requantize(weight, grid, method, gram(96))
    assert not (codes.scales.view(np.uint32) & 0xFFFF).any()
    free = requantize(weight, replace(grid, bfloat16=False), method, gram(96))
    cut = replace(free, scales=(free.scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))

    def error(found: Codes) -> float:
        off = found.dequantize().astype(np.float64) - weight
        return float(np.einsum("ij,jk,ik->", off, gram(96).astype(np.float64), off))

    assert error(codes) < error(cut)


@ALL
def test_zeros_and_blocks_of_one_value(grid: Grid) -> None:
    weight = np.zeros((8, 128), np.float32)
    assert not requantize(weight, grid, "gptq", gram(128)).dequantize().any()
    weight[:] = 0.25
    restored = requantize(weight, grid, "search").dequantize()
    np.testing.assert_allclose(restored, weight, rtol=0.02)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    method=st.sampled_from(["rtn", "search", "hqq", "gptq"]),
    out=st.integers(1, 9),
    inside=st.integers(1, 150),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_any_shape_gives_finite_codes(
    name: str, method: str, out: int, inside: int, seed: int, scale: float
) -> None:
    weight = normal(out, inside, seed) * np.float32(scale)
    codes = requantize(weight, GRIDS[name], method, gram(inside, seed))
    restored = codes.dequantize()
    assert codes.codes.max() <= (1 << GRIDS[name].bits) - 1
    assert np.isfinite(restored).all()
    assert np.abs(restored - weight).max() <= 3 * np.abs(weight).max() + 1e-30


def test_requests_that_make_no_sense() -> None:
    weight = normal(4, 32)
    with pytest.raises(PlanError, match="no quantization method"):
        requantize(weight, int8_rows(), "best")
    with pytest.raises(PlanError, match="needs calibration"):
        requantize(weight, int8_rows(), "gptq")
    with pytest.raises(PlanError, match="don't fit"):
        requantize(weight, int8_rows(), "gptq", gram(16))
    with pytest.raises(PlanError, match="2, 4 or 8 bits"):
        int_blocks(5, 32)
    with pytest.raises(DataError, match="all zero"):
        requantize(weight, int8_rows(), "gptq", np.zeros((32, 32), np.float32))
    weight[0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        requantize(weight, int8_rows(), "rtn")
    with pytest.raises(PlanError, match="export"):
        Codes(int_blocks(4), np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float32)).weight()


@pytest.mark.parametrize("method", ["rtn", "search", "hqq"])
def test_zero_points_keep_off_what_a_format_cant_store(method: str) -> None:
    """Weights of one sign want a zero point of 0, or of 15."""
    weight = np.abs(np.random.default_rng(2).standard_normal((32, 64))).astype(np.float32)
    for least in (0, 1):
        grid = Grid("int", 4, 32, symmetric=False, least_zero=least)
        found = requantize(weight, grid, method)
        assert found.zeros is not None
        assert found.zeros.min() == least
        error = np.linalg.norm(found.dequantize() - weight) / np.linalg.norm(weight)
        assert error < 0.06
    assert found.codes.min() >= 1  # nothing below zero is left
