"""Compiled loops against numpy's passes: the same bits, and the same answer to whether all is finite."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vera_edge import formats
from vera_edge.arrays import Float32
from vera_edge.formats import codes4, compiled
from vera_edge.formats.weight import Weight, WeightFormat
from vera_edge.storage.tensors import float32_to_bf16

SHAPE = (96, 320)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"blocksize": 32}),
    ("nf4", {"double_quant": True}),
    ("nf4", {"blocksize": 256}),
    ("fp4", {"storage": "BF16"}),
    ("bf16", {}),
]


@pytest.fixture(autouse=True)
def _numpy_after() -> Iterator[None]:
    yield
    compiled.stop()


def bits(values: Float32) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def weight(seed: int, shape: tuple[int, int] = SHAPE, scale: float = 0.05) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def stored(name: str, given: dict[str, object], values: Float32) -> tuple[WeightFormat, Weight]:
    target = formats.get(name)
    return target, target.quantize(values, target.options(given))


def summed(base: Weight, target: WeightFormat, given: dict[str, object], step: int) -> tuple[bool, bytes]:
    """The sum of a base and a delta, rounded `step` rows at a time: whether finite, and all its bytes."""
    delta = weight(9, base.shape, 0.01)
    rounder = formats.rounder(target, base.shape, target.options(given))
    finite = [
        formats.round_sum(rounder, base, start, delta[start : start + step])
        for start in range(0, base.shape[0], step)
    ]
    whole = b"".join(tensor.data.tobytes() for tensor in rounder.weight().tensors().values())
    return all(finite), delta.tobytes() + whole


@pytest.mark.parametrize(("name", "given"), OPTIONS)
@pytest.mark.parametrize(("to", "options"), OPTIONS)
@pytest.mark.parametrize("shape", [SHAPE, (96, 129), (7, 9)])
def test_a_merge_is_the_same(
    name: str, given: dict[str, object], to: str, options: dict[str, object], shape: tuple[int, int]
) -> None:
    """Blocks within rows, over their ends, and shorter than a block."""
    if shape == (7, 9) and "storage" in {**given, **options}:
        pytest.skip("an odd number of bytes doesn't fill words of two")
    _, base = stored(name, given, weight(1, shape))
    target = formats.get(to)
    step = 32 if shape[0] == 96 and options.get("blocksize") != 256 else shape[0]
    slow = summed(base, target, options, step)
    compiled.start()
    assert summed(base, target, options, step) == slow
    assert slow[0]


@pytest.mark.parametrize(("name", "given"), OPTIONS)
def test_rows_and_sums_are_the_same(name: str, given: dict[str, object]) -> None:
    _, base = stored(name, given, weight(2))
    slow, sums = base.rows(32, 64), weight(3)[32:64]
    assert formats.add_rows(base, 32, sums)
    compiled.start()
    again = weight(3)[32:64].copy()
    assert formats.add_rows(base, 32, again)
    assert np.array_equal(bits(base.rows(32, 64)), bits(slow))
    assert np.array_equal(bits(again), bits(sums))
    assert np.array_equal(bits(again), bits(weight(3)[32:64] + slow))


@pytest.mark.parametrize(("name", "given"), [one for one in OPTIONS if "double_quant" not in one[1]])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, np.float32(3.4e38)])
@pytest.mark.parametrize("started", [False, True])
def test_what_is_not_finite_is_said(name: str, given: dict[str, object], bad: float, started: bool) -> None:
    """Also where it comes of the sum alone, as of the largest number that is added. (Means of absmax so large
    are beyond float32, so nothing here is double-quantized.)"""
    target, base = stored(name, given, np.full(SHAPE, 3.3e38, np.float32))
    if started:
        compiled.start()
    rounder = formats.rounder(target, SHAPE, target.options(given))
    delta = np.full(SHAPE, -3.3e38, np.float32)
    assert formats.round_sum(rounder, base, 0, delta.copy())
    delta[-1, -1] = bad
    assert not formats.add_rows(base, 0, delta.copy())
    assert not formats.round_sum(formats.rounder(target, SHAPE, target.options(given)), base, 0, delta)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("exponent", [-44, -38, -31, -3, 0, 30])
def test_codes_at_the_bounds_between_levels(quant_type: str, exponent: int) -> None:
    """Values on a bound, and a few steps of float32 to both sides of it."""
    levels = np.sort(codes4.LEVELS[quant_type])
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    rng = np.random.default_rng(4)
    absmax = (rng.uniform(1, 2, 500) * 10.0**exponent).astype(np.float32)
    values = (rng.choice(bounds, (500, 64)) * absmax[:, None]).astype(np.float32)
    toward = rng.choice(np.array([-np.inf, 0, np.inf], np.float32), values.shape)
    for _ in range(3):
        values = np.nextafter(values, np.where(rng.random(values.shape) < 0.5, toward, values))
    values[:, 5] = absmax
    values[7] = 0
    codes, found = codes4.block_codes(values.reshape(-1), 64, quant_type)
    target = formats.get(quant_type)
    compiled.start()
    fast = target.quantize(values, target.options({}))
    assert isinstance(fast, formats.Bnb4Weight)
    assert np.array_equal(bits(fast.absmax), bits(found))
    assert np.array_equal(fast.packed, codes4.pack(codes))


def test_bfloat16_rounds_every_kind_of_number_alike() -> None:
    """Each upper half with lower halves around a tie: subnormals, infinities and NaN among them."""
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (high[:, None] | low).reshape(-1).view(np.float32)
    rounded = np.empty(values.size, np.uint16)
    assert compiled.start()
    compiled.bfloat16().nearest(values, rounded)
    assert np.array_equal(rounded, float32_to_bf16(values))


def test_numba_is_loaded_only_where_it_is_asked_for() -> None:
    script = (
        "import sys, vera_edge, vera_edge.merging, vera_edge.formats.compiled; print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_numba_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not compiled.start()
    assert not compiled.takes(np.zeros(4, np.float32))
